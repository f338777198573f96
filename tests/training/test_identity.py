from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from diffusekrona import inject_krona, unload_krona
from diffusekrona.base import load_base
from diffusekrona.training.identity import base_identity
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline
from tests.training.runs import FAMILIES


@FAMILIES
def test_a_base_is_the_same_wherever_it_is_loaded_from(build, tmp_path):
    build().save_pretrained(tmp_path / "base")
    loaded = load_base(tmp_path / "base")
    assert base_identity(loaded) == base_identity(build())
    assert base_identity(load_base(tmp_path / "base", torch.bfloat16)) != base_identity(loaded)


def test_other_weights_other_models_and_another_scheduler_are_another_base():
    pipes = [
        tiny_sd_pipeline(), tiny_sd_pipeline(seed=1), tiny_sd3_pipeline(),
        tiny_sd_pipeline(prediction_type="v_prediction"),
    ]  # fmt: skip
    assert len({base_identity(pipe) for pipe in pipes}) == 4


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_each_weight_counts(part):
    pipe = tiny_sd_pipeline()
    before = base_identity(pipe)
    weights = list(getattr(pipe, part).parameters())
    for weight in (weights[0], weights[-1]):
        kept = weight.data.clone()
        weight.data += 1
        assert base_identity(pipe) != before
        weight.data = kept
    assert base_identity(pipe) == before


def test_an_adapter_that_came_and_went_leaves_no_trace():
    pipe = tiny_sd_pipeline()
    before = base_identity(pipe)
    inject_krona(pipe)
    unload_krona(pipe)
    assert base_identity(pipe) == before


class Packed(Tensor):
    """As quantized weights are: a type of tensor that not every operation knows."""

    def flatten(self, *_):
        raise NotImplementedError


def identity(weights, part="unet"):
    """Of a pipeline with one model."""
    model = nn.Module()
    for name, weight in weights.items():
        model.register_buffer(name, weight)
    return base_identity(SimpleNamespace(scheduler=SimpleNamespace(config={}), components={part: model, "other": None}))


def test_names_shapes_types_and_numbers_from_all_over_a_weight_count():
    zeros = torch.zeros(16, 8)
    late = zeros.clone()
    late[8:] = 1
    found = [
        identity({"a": zeros}), identity({"b": zeros}), identity({"a": zeros}, "vae"), identity({"a": zeros.T}),
        identity({"a": zeros.int()}), identity({"a": late}),
    ]  # fmt: skip
    assert len(set(found)) == len(found)


def test_another_pipeline_of_the_same_models_is_another_base():
    pipe = tiny_sd_pipeline()
    other = type("OtherPipeline", (), {"scheduler": pipe.scheduler, "components": pipe.components})()
    assert base_identity(other) != base_identity(pipe)


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 2).as_subclass(Packed), torch.zeros(4, 2, device="meta"), torch.zeros(0, 2)]
)
def test_of_weights_without_numbers_the_shapes_count(weight):
    assert identity({"a": weight}) == identity({"a": weight})
    assert identity({"a": weight}) != identity({"a": weight.reshape(-1)})
