"""What differs between families of models: how prompts are encoded, and how the denoiser is called."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import UnsupportedPipelineError
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3

__all__ = ["Family", "StableDiffusion", "StableDiffusion3", "family_of"]


class Family(Protocol):
    """A pipeline of one family."""

    @property
    def denoiser(self) -> nn.Module:
        """Its UNet or transformer."""

    @property
    def dtype(self) -> torch.dtype:
        """That the denoiser computes in."""

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """All that the denoiser is told of prompts, each tensor with a row per prompt."""

    def example(self, count: int) -> dict[str, Tensor]:
        """Tensors of the shapes that `encode` gives for so many prompts."""

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the denoiser says of noisy latents.

        Args:
            noisy: (batch, channels, height, width).
            timesteps: (batch).
            text: what `encode` gave, with a row per latent.
            sizes: (batch, 6), original height and width, crop top and left, target height and width.
        """


def family_of(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        UnsupportedPipelineError: none of those that are known, or not for text to image.
    """
    for family in (StableDiffusion, StableDiffusion3):
        if all(getattr(pipe, part, None) is not None for part in family.PARTS) and hasattr(pipe, "encode_prompt"):
            _check_channels(pipe, getattr(pipe, family.PARTS[0]))
            return family(pipe)
    raise UnsupportedPipelineError(
        f"{type(pipe).__name__} is none of the pipelines that can be trained: Stable Diffusion 1.x, 2.x, SDXL and 3, "
        f"text to image. Each needs {', '.join(StableDiffusion.PARTS)}, or a transformer in place of the UNet."
    )


def _check_channels(pipe: Any, denoiser: Any) -> None:
    taken, given = denoiser.config.in_channels, pipe.vae.config.latent_channels
    if taken != given:
        raise UnsupportedPipelineError(
            f"The denoiser of {type(pipe).__name__} takes {taken} channels, but its autoencoder gives {given}. "
            "Inpainting, depth and upscaling models are not supported; use the text-to-image model."
        )
