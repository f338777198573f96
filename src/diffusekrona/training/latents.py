"""Images as latents: the autoencoder is run once per image, its posterior is sampled anew in every step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from .encoded import Encoded, Keep, fingerprint

View = tuple[int, bool]
"""Which image, and whether it is mirrored."""

_SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


class LatentPosteriors:
    """Mean and standard deviation of each image's latents, scaled as the denoiser expects them.

    With `flip`, each image is encoded mirrored as well, and every draw shows it either way with equal chance.

    Args:
        vae: an `AutoencoderKL`; a half-precision one is run in float32, because SDXL's overflows in float16.
        images: RGB.
        flip: whether draws may be mirrored.
        device: where the autoencoder runs; it goes to the CPU afterwards unless it has to run in each step.
        keep: where the posteriors stay.
        folder: of their files, for "disk".
    """

    def __init__(
        self,
        vae: Any,
        images: Sequence[Image.Image],
        *,
        flip: bool,
        device: torch.device,
        keep: Keep = "memory",
        folder: Path | None = None,
    ) -> None:
        self._vae, self._images, self._flip = vae, images, flip
        marks = [_mark_of_image(image) for image in images]
        model = fingerprint([vae], str([vae.config.get(name) for name in _SCALES])) if keep == "disk" else ""
        self._posteriors = Encoded(
            self._posterior, keep, folder, lambda view: f"latents-{model}-{marks[view[0]]}-{int(view[1])}"
        )
        vae.to(device)
        self._posteriors.prepare((index, mirrored) for index in range(len(images)) for mirrored in {False, flip})
        if keep != "none":
            vae.to("cpu")

    def sample(self, index: int, generator: torch.Generator) -> Tensor:
        """Draw z ~ N(mean, std²) for an image: (channels, height, width), float32, on the CPU."""
        mirrored = self._flip and bool(torch.randint(2, (), generator=generator))
        posterior = self._posteriors[index, mirrored]
        mean, std = posterior["mean"], posterior["std"]
        return mean + std * torch.randn(mean.shape, generator=generator)

    @torch.no_grad()
    def _posterior(self, view: View) -> dict[str, Tensor]:
        """Scaled mean and standard deviation, each (channels, height, width), float32."""
        image = self._images[view[0]]
        image = ImageOps.mirror(image) if view[1] else image
        before = self._vae.dtype
        _cast(self._vae, torch.float32)
        try:
            posterior = self._vae.encode(_pixels(image).to(self._vae.device)).latent_dist
        finally:
            # Widening and narrowing again gives the same half-precision numbers back.
            _cast(self._vae, before)
        shift, scale = _normalisation(self._vae, posterior.mean)
        return {"mean": ((posterior.mean - shift) * scale)[0], "std": (posterior.std * scale)[0]}


def _mark_of_image(image: Image.Image) -> str:
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


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
    factor, shift = float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0)
    if mean is None or std is None:
        return torch.full_like(like, shift), torch.full_like(like, factor)
    return like.new_tensor(mean).view(1, -1, 1, 1), factor / like.new_tensor(std).view(1, -1, 1, 1)
