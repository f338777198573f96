"""Put the trained parts together as a `StableDiffusionXLPipeline` folder of half-precision weights."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from . import unet as unet_stage
from . import vae as vae_stage
from .art import ROOT
from .training import note, pick_device

FOLDER = ROOT / "models" / "drawings-sdxl"


def export(folder: Path = FOLDER) -> None:
    """Write the pipeline's folder from the averaged weights.

    The weights are halves, but every config says float32, so that all parts come out alike from a plain
    `from_pretrained`: transformers takes its networks' type from the config, diffusers always takes float32.
    """
    model = unet_stage.averaged()
    unet_stage.assemble(model, vae_stage.load()).to(dtype=torch.float16).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        model.text.tokenizer.backend_tokenizer.model.save(str(folder / name))  # what transformers 4 reads
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where it lay while it was trained
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    pipe = load(folder)
    kinds = {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)}
    assert kinds == {torch.float32}, kinds
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    note(f"exported {folder.name}: {size / 1e6:.1f} MB")


def load(folder: Path = FOLDER) -> StableDiffusionXLPipeline:
    """The exported pipeline as a user loads it, on the chosen device."""
    pipe: StableDiffusionXLPipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    return pipe.to(pick_device())
