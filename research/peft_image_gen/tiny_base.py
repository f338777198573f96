"""What the dry run gives the benchmark in place of FLUX.2 klein, its pictures and DINOv2: all small, all random."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusekrona.bases.architectures import default_dtype

PICTURES = Path(__file__).parents[2] / "examples" / "toy-bear"
RESOLUTION, TEXT_TOKENS = 32, 64


def write_base(folder: Path) -> None:
    """Write a klein of one double and one single block, as wide as klein 4B's, so that factors fit unchanged, in bf16.

    Its text encoder and its autoencoder are tiny.
    """
    from diffusers import Flux2Transformer2DModel

    pipe: Any = import_module("tests.pipelines").tiny_klein_pipeline()
    config = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (32,) * 4}
    config |= {"num_attention_heads": 24, "attention_head_dim": 128}
    torch.manual_seed(0)
    with default_dtype(torch.bfloat16):
        transformer = Flux2Transformer2DModel(**config)
    for modulation in (
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
    ):
        modulation.linear.weight.data *= 30  # a new one's gates are all but closed
    pipe.transformer = transformer
    pipe.save_pretrained(folder)


def write_encoder(folder: Path) -> None:
    """Write a DINOv2 of two layers, 32 wide, with its image processor."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    BitImageProcessor(size={"shortest_edge": 56}, crop_size=size).save_pretrained(folder)


def write_pictures(folder: Path) -> int:
    """Write the toy bear's pictures; how many."""
    folder.mkdir(parents=True)
    found = sorted(PICTURES.glob("*.png"))
    for path in found:
        with Image.open(path) as picture:
            picture.convert("RGB").save(folder / path.name)
    return len(found)


def write_all(folder: Path, steps: int) -> dict[str, Any]:
    """Write all three; the benchmark's settings that point at them and make the run short."""
    base, encoder, pictures = folder / "base", folder / "dino", folder / "pictures"
    write_base(base)
    write_encoder(encoder)
    count = write_pictures(pictures)
    return {
        "model_id": str(base),
        "dataset_id": str(pictures),
        "dino_model_id": str(encoder),
        "resolution": RESOLUTION,
        "max_steps": steps,
        "eval_steps": steps,
        "valid_size": 1,
        "test_size": 1,
        "num_inference_steps": 2,
        "max_sequence_length": TEXT_TOKENS,
        "text_encoder_out_layers": [9, 18, 27],
        "instance_prompts": [f"a sks toy, {number}" for number in range(count)],
        "sample_image_prompts": ["a sks toy on a beach"],
        "drift_image_prompts": ["a photo of a cat"],
    }
