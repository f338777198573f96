"""Architectures that people train or that the paper counts on, from published configurations, without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import KronAError

if TYPE_CHECKING:
    import torch
    from torch import nn

_SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
_SD15_TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}

_SDXL_TEXT_ENCODER_2: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("SD3Transformer2DModel", {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192,
    }),
    "sd35-large": ("SD3Transformer2DModel", {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    }),
    "flux1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "flux2-klein-4b": ("Flux2Transformer2DModel", {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "guidance_embeds": False,
    }),
    "flux2-klein-9b": ("Flux2Transformer2DModel", {
        "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
        "guidance_embeds": False,
    }),
    "chroma": ("ChromaTransformer2DModel", {}),
    "z-image": ("ZImageTransformer2DModel", {}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "krea2": ("Krea2Transformer2DModel", {}),
    "sana-1600m": ("SanaTransformer2DModel", {}),
    "pixart-sigma": ("PixArtTransformer2DModel", {"caption_channels": 4096, "interpolation_scale": 2}),
    "wan-14b": ("WanTransformer3DModel", {}),
    "wan-1300m": ("WanTransformer3DModel", {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}),
}  # fmt: skip
"""Transformers by name: their class in Diffusers, and what differs from its defaults, which are a published model's.

SD 3's and klein's are those of Diffusers' conversion scripts.
"""


def _transformer(name: str) -> nn.Module:
    import diffusers

    kind, values = _TRANSFORMERS[name]
    return getattr(diffusers, kind)(**values)  # type: ignore[no-any-return]


def _unet(values: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**values)  # type: ignore[no-any-return]


def _text_encoder(values: dict[str, Any], class_name: str) -> nn.Module:
    import transformers

    return getattr(transformers, class_name)(transformers.CLIPTextConfig(**values))  # type: ignore[no-any-return]


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "sdxl": lambda: _unet(_SDXL_UNET),
    "sd15": lambda: _unet(_SD15_UNET),
    "sd15-text-encoder": lambda: _text_encoder(_SD15_TEXT_ENCODER, "CLIPTextModel"),
    "sdxl-text-encoder-2": lambda: _text_encoder(_SDXL_TEXT_ENCODER_2, "CLIPTextModelWithProjection"),
    **{name: partial(_transformer, name) for name in _TRANSFORMERS},
}
"""Name → builder: UNets and text encoders of SDXL and Stable Diffusion 1.x, and transformers."""

PIPELINES: dict[str, dict[str, str]] = {
    "sdxl": {"unet": "sdxl", "text_encoder": "sd15-text-encoder", "text_encoder_2": "sdxl-text-encoder-2"},
    "sd15": {"unet": "sd15", "text_encoder": "sd15-text-encoder"},
    **{name: {"transformer": name} for name in _TRANSFORMERS},
}
"""Pipeline → its adaptable components, each by its name in `ARCHITECTURES`; beside transformers, no text encoders."""

CLASSES = {name: kind for name, (kind, _) in _TRANSFORMERS.items()}
"""Transformers by name → class in Diffusers."""


def build(name: str, device: str = "meta", dtype: torch.dtype | None = None) -> nn.Module:
    """One of `ARCHITECTURES`, by default in float32: without memory on the meta device, elsewhere with random weights.

    Raises:
        KronAError: no architecture has that name.
    """
    if name not in ARCHITECTURES:
        raise KronAError(f"No architecture is named {name!r}; there are: {', '.join(ARCHITECTURES)}.")
    import torch

    with default_dtype(dtype or torch.float32), torch.device(device):
        return ARCHITECTURES[name]()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new weights in this dtype."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_pipeline(name: str) -> dict[str, nn.Module]:
    """The adaptable components of one of `PIPELINES`, without weights.

    Raises:
        KronAError: no pipeline has that name.
    """
    if name not in PIPELINES:
        raise KronAError(f"No pipeline is named {name!r}; there are: {', '.join(PIPELINES)}.")
    return {part: build(architecture) for part, architecture in PIPELINES[name].items()}
