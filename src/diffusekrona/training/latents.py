"""Images as latents: the autoencoder is run once per image, its posterior is sampled anew in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn


class LatentPosteriors:
    """Mean and standard deviation of each image's latents, scaled as the UNet expects them.

    With `flip`, each image is encoded mirrored as well, and every draw shows it either way with equal chance.

    Args:
        vae: an `AutoencoderKL`; a half-precision one is run in float32, because SDXL's overflows in float16.
        images: RGB, all of one size.
        flip: whether draws may be mirrored.
    """

    def __init__(self, vae: Any, images: Sequence[Image.Image], *, flip: bool) -> None:
        views = [list(images)]
        if flip:
            views.append([ImageOps.mirror(image) for image in images])
        encoded = _encode(vae, [image for view in views for image in view])
        shape = (len(views), len(images), *encoded[0].shape[1:])
        self._mean, self._std = encoded[0].view(shape), encoded[1].view(shape)

    def sample(self, indices: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw z ~ N(mean, std²) for these images: (batch, channels, height, width), float32."""
        views = torch.randint(len(self._mean), (len(indices),), generator=generator)
        rows = torch.as_tensor(indices)
        mean, std = self._mean[views, rows], self._std[views, rows]
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)


@torch.no_grad()
def _encode(vae: Any, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Scaled means and standard deviations, each (images, channels, height, width), float32."""
    before = vae.dtype
    _cast(vae, torch.float32)
    try:
        # One at a time: at 1024 pixels the autoencoder takes more memory than the training step.
        posteriors = [vae.encode(_pixels(image).to(vae.device)).latent_dist for image in images]
    finally:
        # Widening and narrowing again gives the same half-precision numbers back.
        _cast(vae, before)
    mean = torch.cat([posterior.mean for posterior in posteriors])
    std = torch.cat([posterior.std for posterior in posteriors])
    shift, scale = _normalisation(vae, mean)
    return (mean - shift) * scale, std * scale


def _cast(vae: nn.Module, dtype: torch.dtype) -> None:
    # Diffusers' own `to` warns about every cast, also about those that do no harm.
    nn.Module.to(vae, dtype=dtype)


def _pixels(image: Image.Image) -> Tensor:
    """(1, 3, height, width) in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32)
    return (torch.from_numpy(array) / 127.5 - 1).permute(2, 0, 1).unsqueeze(0)


def _normalisation(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """What to subtract from latents and then multiply them by, broadcast over (batch, channels, h, w)."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    factor = float(vae.config.scaling_factor)
    if mean is None or std is None:
        return torch.zeros_like(like[:1]), torch.full_like(like[:1], factor)
    return like.new_tensor(mean).view(1, -1, 1, 1), factor / like.new_tensor(std).view(1, -1, 1, 1)
