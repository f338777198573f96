"""Put the trained parts together as a `StableDiffusionXLPipeline` folder, stored in half precision."""

import json

import torch
from diffusers import StableDiffusionXLPipeline

from diffusekrona.bases.loading import config_in_float32

from . import unet as unet_stage
from . import vae as vae_stage
from .art import ROOT
from .training import note, pick_device

FOLDER = ROOT / "models" / "emoji-sdxl"


def assemble(model: unet_stage.Model) -> StableDiffusionXLPipeline:
    """The pipeline around the given networks, in float32."""
    return StableDiffusionXLPipeline(
        vae=vae_stage.load().to(model.unet.device),
        text_encoder=model.text.first,
        text_encoder_2=model.text.second,
        tokenizer=model.text.tokenizer,
        tokenizer_2=model.text.tokenizer,
        unet=model.unet,
        scheduler=unet_stage.build_scheduler(),
        add_watermarker=False,
    )


def export() -> None:
    """Write `models/emoji-sdxl` from the averaged weights."""
    model, _ = unet_stage.averaged()
    assemble(model).to(dtype=torch.float16).save_pretrained(FOLDER)
    for name in ("tokenizer", "tokenizer_2"):
        model.text.tokenizer.backend_tokenizer.model.save(str(FOLDER / name))  # what transformers 4 reads
    for file in FOLDER.glob("*/config.json"):
        config = json.loads(config_in_float32(file))
        config.pop("_name_or_path", None)  # where it lay while it was trained
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    note(f"exported {FOLDER.name}: {size / 1e6:.1f} MB")


def load() -> StableDiffusionXLPipeline:
    """The exported pipeline as a user loads it, in float32 and on the chosen device."""
    pipe: StableDiffusionXLPipeline = StableDiffusionXLPipeline.from_pretrained(FOLDER)
    return pipe.to(pick_device())
