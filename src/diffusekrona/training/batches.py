"""Random batches: which images, which noise and how much of it; and what the UNet makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .conditioning import TextConditioning
from .config import TrainingConfig
from .data import TrainingImage
from .latents import LatentPosteriors
from .objective import DenoisingObjective


class Batches:
    """Draws random batches of a pipeline's training images and computes their loss.

    Args:
        pipe: a pipeline that `check_pipeline` accepts, on the device to train on.
        images: what to draw from; all are used equally often.
        config: batch size, flips, the loss's weights, and whether the text encoders are trained.
        generator: decides all that is random here; on the CPU.
    """

    def __init__(
        self, pipe: Any, images: Sequence[TrainingImage], config: TrainingConfig, generator: torch.Generator
    ) -> None:
        self._unet = pipe.unet
        self._device: torch.device = pipe.unet.device
        # Not the UNet's own `dtype`, which may be that of a factor.
        self._dtype: torch.dtype = pipe.unet.conv_in.weight.dtype
        self._generator = generator
        self._order = _endless_shuffle(len(images), generator)
        self._batch_size = config.batch_size
        self._objective = DenoisingObjective(pipe.scheduler, config.snr_gamma, self._device)
        self._posteriors = LatentPosteriors(pipe.vae, [image.image for image in images], flip=config.horizontal_flip)
        self._conditioning = TextConditioning(pipe, images, trainable=config.text_encoders, dtype=self._dtype)

    def loss(self, accelerator: Accelerator) -> Tensor:
        """Loss of one freshly drawn batch, a float32 scalar with gradients."""
        indices = [next(self._order) for _ in range(self._batch_size)]
        latents = self._posteriors.sample(indices, self._generator)
        noise = torch.randn(latents.shape, generator=self._generator).to(self._device)
        levels = self._objective.timesteps
        timesteps = torch.randint(levels, (len(indices),), generator=self._generator).to(self._device)
        noisy = self._objective.add_noise(latents, noise, timesteps).to(self._dtype)
        with accelerator.autocast():
            conditions = self._conditioning(indices)
            prediction = self._unet(noisy, timesteps, return_dict=False, **conditions)[0]
        return self._objective.loss(prediction, latents, noise, timesteps)


def _endless_shuffle(count: int, generator: torch.Generator) -> Iterator[int]:
    """Every index once in random order, then again, so that all images are used equally often."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
