"""Published base models as folders of configurations, without weights, from which `--plan` reads what a run takes.

Sizes are from the configurations that their makers published; where nothing is given, they are the defaults of the
classes of Diffusers and transformers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from diffusekrona.bases.architectures import build

_T5 = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_QWEN3_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
_GEMMA2_2B = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
_MISTRAL_24B = {
    "text_config": {
        "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "vision_config": {"model_type": "pixtral"},
}  # fmt: skip
_QWEN25_VL_7B = {
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
}  # fmt: skip
_QWEN3_VL_4B = {
    "text_config": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "vision_config": {"out_hidden_size": 2560},
}  # fmt: skip
_LEVELS = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_SIXTEEN = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
"""Latent channels of an autoencoder like Stable Diffusion 3's."""


def _clip(name: str) -> Callable[[], nn.Module]:
    return lambda: build(name)


def _text(kind: str, config: str, values: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**values))


def _autoencoder(kind: str = "AutoencoderKL", **values: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(diffusers, kind)(**values)


_CLIP_L, _CLIP_G = _clip("sd15-text-encoder"), _clip("sdxl-text-encoder-2")
_T5_XXL = _text("T5EncoderModel", "T5Config", _T5)
_FLUX_VAE = _autoencoder(**_LEVELS, **_SIXTEEN, shift_factor=0.1159, scaling_factor=0.3611)


@dataclass(frozen=True)
class Published:
    """A base model.

    Attributes:
        pipeline: its class in Diffusers.
        denoiser: its name in `diffusekrona.bases.architectures`.
        encoders: of text, in the order of the pipeline's names.
        vae: the autoencoder.
        scheduler: its class, and its values.
        options: entries of the pipeline's index.
    """

    pipeline: str
    denoiser: str
    encoders: tuple[Callable[[], nn.Module], ...]
    vae: Callable[[], nn.Module]
    scheduler: tuple[str, dict[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {})
    options: dict[str, Any] = field(default_factory=dict)


_DIFFUSION = ("DDIMScheduler", {})
_SHIFTED = ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True})

BASES = {
    "sd15": Published("StableDiffusionPipeline", "sd15", (_CLIP_L,), _autoencoder(**_LEVELS), _DIFFUSION),
    "sdxl": Published("StableDiffusionXLPipeline", "sdxl", (_CLIP_L, _CLIP_G), _autoencoder(**_LEVELS), _DIFFUSION),
    "sd35": Published(
        "StableDiffusion3Pipeline", "sd35-large", (_CLIP_L, _CLIP_G, _T5_XXL), _autoencoder(**_LEVELS, **_SIXTEEN)
    ),
    "flux": Published("FluxPipeline", "flux1", (_CLIP_L, _T5_XXL), _FLUX_VAE, _SHIFTED),
    "flux2": Published(
        "Flux2Pipeline", "flux2", (_text("Mistral3ForConditionalGeneration", "Mistral3Config", _MISTRAL_24B),),
        _autoencoder("AutoencoderKLFlux2"), _SHIFTED,
    ),
    "klein": Published(
        "Flux2KleinPipeline", "flux2-klein-4b", (_text("Qwen3ForCausalLM", "Qwen3Config", _QWEN3_4B),),
        _autoencoder("AutoencoderKLFlux2"), _SHIFTED,
    ),
    "chroma": Published("ChromaPipeline", "chroma", (_T5_XXL,), _FLUX_VAE),
    "z-image": Published(
        "ZImagePipeline", "z-image", (_text("Qwen3Model", "Qwen3Config", _QWEN3_4B),), _FLUX_VAE, _SHIFTED
    ),
    "qwen-image": Published(
        "QwenImagePipeline", "qwen-image",
        (_text("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", _QWEN25_VL_7B),),
        _autoencoder("AutoencoderKLQwenImage"), _SHIFTED,
    ),
    "krea2": Published(
        "Krea2Pipeline", "krea2", (_text("Qwen3VLModel", "Qwen3VLConfig", _QWEN3_VL_4B),),
        _autoencoder("AutoencoderKLQwenImage"), _SHIFTED,
    ),
    "sana": Published(
        "SanaPipeline", "sana-1600m", (_text("Gemma2Model", "Gemma2Config", _GEMMA2_2B),),
        _autoencoder("AutoencoderDC"),
    ),
    "pixart": Published("PixArtSigmaPipeline", "pixart-sigma", (_T5_XXL,), _autoencoder(**_LEVELS), _DIFFUSION),
    "wan": Published(
        "WanPipeline", "wan-1300m", (_text("UMT5EncoderModel", "UMT5Config", {**_T5, "vocab_size": 256384}),),
        _autoencoder("AutoencoderKLWan"), ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
    ),
}  # fmt: skip
"""The bases of `examples/settings`, by the names of the files."""


def write_configs(name: str, folder: Path) -> Path:
    """Write one of `BASES` without weights, as `--plan` reads it, into a new folder; that folder."""
    base = BASES[name]
    kind = getattr(diffusers, base.pipeline)
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    denoiser = next(name for name in names if name in ("unet", "transformer"))
    encoders = [name for name in names if name.startswith("text_encoder") and "layers" not in name]
    with torch.device("meta"):
        models = {denoiser: build(base.denoiser), "vae": base.vae()}
        models |= {part: make() for part, make in zip(encoders, base.encoders, strict=True)}
    scheduler, values = base.scheduler
    models["scheduler"] = getattr(diffusers, scheduler)(**values)
    index: dict[str, Any] = {"_class_name": base.pipeline, **base.options}
    for part in names:
        model = models.get(part)
        if model is not None:
            library = "transformers" if part in encoders else "diffusers"
            index[part] = [library, type(model).__name__]
            (model.config.save_pretrained if part in encoders else model.save_config)(folder / part)
        elif part.startswith(("tokenizer", "feature", "image_encoder", "safety", "transformer")):
            index[part] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
