"""Bases that are quantized on loading, and runs on them."""

from __future__ import annotations

import importlib.util
import math

import pytest
from torch import nn

from diffusekrona import load_krona
from diffusekrona.bases.loading import load_base
from diffusekrona.bases.quantization import PACKAGES, Quantization, QuantizationError
from diffusekrona.training import TrainingConfigError
from diffusekrona.training.plan import plan
from diffusekrona.training.run import run
from diffusekrona.training.settings import Settings
from diffusekrona.tuner.injected import krona_layers
from diffusekrona.tuner.quantized import is_quantized
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline
from tests.training.runs import pictures

FORMATS = pytest.mark.parametrize("kind", PACKAGES)


@pytest.fixture(scope="module", params=[tiny_sd_pipeline, tiny_sd3_pipeline], ids=["sd", "sd3"])
def place(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    request.param().save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for number, picture in enumerate(pictures()):
        picture.save(folder / "images" / f"{number}.png")
    return folder, request.param


def settings(folder, output, **values):
    given = {
        "pretrained_model_name_or_path": str(folder / "base"), "instance_data_dir": str(folder / "images"),
        "instance_prompt": "a sks toy", "output_dir": str(output), "a1": 4, "a2": 8, "max_train_steps": 2,
        "learning_rate": 1e-2,
    }  # fmt: skip
    return Settings.of({**given, **values})


def quantized_layers(module):
    return [name for name, part in module.named_modules() if hasattr(part, "in_features") and is_quantized(part)]


def linear_layers(module):
    return [name for name, part in module.named_modules() if hasattr(part, "in_features")]


@FORMATS
def test_every_linear_layer_of_the_chosen_models_is_quantized_and_no_other(kind, place):
    pytest.importorskip(PACKAGES[kind])
    base = place[0] / "base"
    pipe = load_base(base, quantization=Quantization(denoiser=kind))
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    assert quantized_layers(denoiser) == linear_layers(denoiser) != []
    assert quantized_layers(pipe.text_encoder) == quantized_layers(pipe.vae) == []
    pipe = load_base(base, quantization=Quantization(text_encoders=kind))
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    left = set(linear_layers(pipe.text_encoder)) - set(quantized_layers(pipe.text_encoder))
    assert left <= {"text_projection"}  # which transformers leaves as it is
    assert quantized_layers(denoiser) == quantized_layers(pipe.vae) == []


@FORMATS
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"quantize_text_encoders": True, "cache": "disk"},
        {"quantize_text_encoders": True, "train_text_encoder": True},
    ],
    ids=["frozen text", "bf16", "text", "trained text"],
)
def test_a_run_on_a_quantized_base_trains_and_its_adapter_loads_without(kind, values, place, tmp_path):
    pytest.importorskip(PACKAGES[kind])
    folder, build = place
    if "quantize_text_encoders" in values:
        values = {**values, "quantize_text_encoders": kind}
    chosen = settings(folder, tmp_path / "out.safetensors", quantize=kind, **values)
    outcome = run(chosen)
    assert all(math.isfinite(loss) for loss in outcome.result.losses)
    pipe = build()
    load_krona(pipe, outcome.saved[0])
    layers = krona_layers(getattr(pipe, "unet", None) or pipe.transformer)
    assert len(layers) > 0
    learnt = [bool(layer.krona_B["default"].any()) for layer in layers.values()]
    assert sum(learnt) > 0.8 * len(learnt)  # the last block of SD3 makes no use of what its text becomes
    assert not any(is_quantized(layer.get_base_layer()) for layer in layers.values())


@FORMATS
def test_quantized_training_starts_at_about_the_loss_of_the_plain_one(kind, place, tmp_path):
    pytest.importorskip(PACKAGES[kind])
    losses = [
        run(settings(place[0], tmp_path / f"{how}.safetensors", quantize=how, max_train_steps=1)).result.losses[0]
        for how in (None, kind)
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@FORMATS
@pytest.mark.parametrize("part", ["quantize", "quantize_text_encoders"])
def test_a_missing_package_is_named_with_how_to_install_it(kind, part, place, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "diffusekrona.bases.quantization.find_spec", lambda name: None if name == PACKAGES[kind] else there(name)
    )
    with pytest.raises(QuantizationError, match=f"{kind} needs {PACKAGES[kind]}: pip install {PACKAGES[kind]}"):
        run(settings(place[0], tmp_path / "out", **{part: kind}))


@FORMATS
def test_a_plan_counts_the_bytes_of_quantized_weights(kind, place, tmp_path):
    pytest.importorskip(PACKAGES[kind])
    planned = plan(settings(place[0], tmp_path / "out", quantize=kind))
    found = planned.weights
    pipe = load_base(place[0] / "base", quantization=Quantization(kind))
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    assert found == pytest.approx(stored_bytes(denoiser), rel=0.05)
    assert found < 0.7 * plan(settings(place[0], tmp_path / "out")).weights


def stored_bytes(module: nn.Module) -> int:
    """Of all tensors that make up a module's parameters."""
    total = 0
    for weight in module.parameters():
        if hasattr(weight, "quant_state"):
            total += weight.nbytes + weight.quant_state.absmax.nbytes
        elif hasattr(weight, "qdata"):
            total += weight.qdata.nbytes
        else:
            total += weight.nbytes
    return total


def test_quantized_weights_are_not_offloaded(place, tmp_path):
    with pytest.raises(TrainingConfigError, match="offload 'all' cannot move weights that quantize has made int8"):
        settings(place[0], tmp_path / "out", quantize="int8", offload="all")
