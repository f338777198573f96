"""Copies of adapted models stand alone; a weight of 0 is no end of an adapter."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from diffusekrona import (
    KronAConfig,
    inject_krona,
    load_krona,
    merge_krona,
    save_krona,
    unload_krona,
    unmerge_krona,
)
from tests.pipelines import tiny_sd_pipeline
from tests.snapshots import assert_same, bits, snapshot


def config(**fields: Any) -> KronAConfig:
    return KronAConfig(**{"a1": 4, "a2": 8, "init_weights": False, **fields})


def output(unet: nn.Module, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 64, generator=generator)
    text = text[..., : unet.config.cross_attention_dim]
    with torch.no_grad():
        return unet(sample, 5, text, **arguments).sample


def plain(model: nn.Module) -> dict[str, Any]:
    """What a model is, identities aside."""
    found = snapshot(model)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    keep = {key: seen for key, seen in found.items() if key.endswith((" attributes", " hooks", "state_dict"))}
    return {**keep, "bits": bits(model), "trainable": trainable}


@pytest.mark.parametrize("first", ["copy", "original"])
@pytest.mark.parametrize("merged", [False, True])
def test_unloading_one_of_two_copies_leaves_the_other(first: str, merged: bool) -> None:
    unet = tiny_sd_pipeline().unet
    before, base = plain(unet), output(unet)
    inject_krona(unet, config())
    adapted = output(unet)
    if merged:
        merge_krona(unet)
    other = copy.deepcopy(unet)
    gone, left = (other, unet) if first == "copy" else (unet, other)
    unload_krona(gone)
    assert_same(before, plain(gone))
    assert torch.equal(output(gone), base)
    torch.testing.assert_close(output(left), adapted, rtol=1e-4, atol=1e-5)
    unmerge_krona(left)
    assert torch.equal(output(left), adapted)
    unload_krona(left)
    assert_same(before, plain(left))
    assert not {p.data_ptr() for p in gone.parameters()} & {p.data_ptr() for p in left.parameters()}


def test_an_adapter_comes_back_after_a_weight_of_zero(tmp_path):
    pipe = tiny_sd_pipeline()
    base = output(pipe.unet)
    inject_krona(pipe, config())
    adapted = output(pipe.unet)
    pipe.set_adapters("default", adapter_weights=0.0)
    assert torch.equal(output(pipe.unet), base)
    path = save_krona(pipe, tmp_path / "a.safetensors")
    pipe.set_adapters("default", adapter_weights=1.0)
    assert torch.equal(output(pipe.unet), adapted)
    again = tiny_sd_pipeline()
    load_krona(again, path)
    assert torch.equal(output(again.unet), adapted)


def test_merging_with_a_weight_of_zero_changes_nothing_and_is_undone():
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config())
    before, adapted = bits(pipe.unet), output(pipe.unet)
    pipe.set_adapters("default", adapter_weights=0.0)
    merge_krona(pipe)
    assert bits(pipe.unet) == before
    unmerge_krona(pipe)
    pipe.set_adapters("default", adapter_weights=1.0)
    assert torch.equal(output(pipe.unet), adapted)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_call_with_the_scale_zero_leaves_the_weight_that_was_set(weight: float) -> None:
    pipe = tiny_sd_pipeline()
    base = output(pipe.unet)
    inject_krona(pipe, config(alpha=2.0))
    pipe.set_adapters("default", adapter_weights=weight)
    adapted = output(pipe.unet)
    for _ in range(2):
        assert torch.equal(output(pipe.unet, cross_attention_kwargs={"scale": 0.0}), base)
        assert torch.equal(output(pipe.unet), adapted)


def test_layers_scaled_by_zero_are_scaled_back():
    model = nn.Sequential(nn.Linear(16, 16))
    inject_krona(model, config(target_modules=["0"], alpha=2.0))
    layer = model[0]
    layer.set_scale("default", 0.5)
    for scale in (0, 0.0):
        layer.scale_layer(scale)
        assert layer.scaling["default"] == 0
        layer.unscale_layer(scale)
        assert layer.scaling["default"] == 1.0
    layer.set_scale("default", 1.0)
    assert layer.scaling["default"] == 2.0
