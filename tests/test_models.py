"""The models of `models/`, as someone loads them who knows nothing of how they are stored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel, ResNetForImageClassification, ViTModel

MODELS = Path(__file__).parents[1] / "models"


def test_the_base_loads_in_float32_without_a_dtype_and_draws() -> None:
    pipe = DiffusionPipeline.from_pretrained(MODELS / "emoji-sdxl")
    pipe.set_progress_bar_config(disable=True)
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
    image = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 10


def test_the_base_loads_in_half_precision_where_that_is_asked_for() -> None:
    pipe = DiffusionPipeline.from_pretrained(MODELS / "emoji-sdxl", dtype=torch.float16)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {torch.float16}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("emoji-clip", CLIPModel),
        ("emoji-vit", ViTModel),
        ("emoji-classifier", ResNetForImageClassification),
        ("drawings-encoder", ResNetForImageClassification),
    ],
)
def test_judges_load_in_float32_without_a_dtype(name: str, kind: type) -> None:
    model = kind.from_pretrained(MODELS / name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_all_weights_are_stored_in_half_precision() -> None:
    files = sorted(MODELS.rglob("*.safetensors"))
    assert len(files) == 8
    for file in files:
        dtypes = {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()}
        assert dtypes == {torch.float16}, file
