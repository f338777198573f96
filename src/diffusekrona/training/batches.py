"""The loss of each batch of a run: which images, which noise and how much of it; what the denoiser says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..tuner.components import forget
from .config import TrainingConfig
from .data import Size, TrainingImage
from .encoding import LatentPosteriors, Texts
from .families import Family
from .objective import objective_of
from .randomness import Order, Sample, generator_for
from .timesteps import draw_place


class Batches:
    """The batches that one set of training images makes, numbered from 0, and this process's share of them.

    Args:
        name: of the set, such as "subject".
        pipe: the pipeline that is trained, its encoders go to the device and back.
        family: of the pipeline.
        images: what to draw from; all are used equally often.
        config: batch size, the loss's weights, and whether the text encoders are trained.
        accelerator: device and processes.
        folder: for what is cached on disk.
    """

    def __init__(
        self,
        name: str,
        pipe: Any,
        family: Family,
        images: Sequence[TrainingImage],
        config: TrainingConfig,
        accelerator: Accelerator,
        folder: Path | None = None,
    ) -> None:
        self._family, self._images, self._config, self._accelerator = family, images, config, accelerator
        device = accelerator.device
        self._objective = objective_of(
            pipe.scheduler, device, snr_gamma=config.snr_gamma, weighting=config.loss_weighting
        )
        kinds = [image.image.size for image in images]
        self._order = Order(kinds, config.train_batch_size * accelerator.num_processes, config.seed, name)
        self._latents = LatentPosteriors(
            family,
            [image.image for image in images],
            flip=config.random_flip,
            device=device,
            keep=config.cache,
            folder=folder,
        )
        self._texts = Texts(
            family,
            (image.prompt for image in images),
            text_encoders(pipe),
            trained=config.train_text_encoder,
            device=device,
            keep=config.cache,
            folder=folder,
        )

    def loss(self, number: int) -> Tensor:
        """Loss of a batch, a float32 scalar with gradients."""
        samples = self._share(number)
        latents, noise, levels = (part.to(self._accelerator.device) for part in self._latents_and_noise(samples))
        images = [self._images[sample.index] for sample in samples]
        noisy = self._objective.add_noise(latents, noise, levels).to(self._family.dtype)
        sizes = torch.tensor([image.sizes for image in images], dtype=torch.float32, device=latents.device)
        with self._accelerator.autocast():
            text = self._texts([image.prompt for image in images])
            prediction = self._family.predict(noisy, self._objective.timesteps(levels), text, sizes)
        target = self._objective.target(latents, noise, levels)
        return (self._objective.weights(levels) * self._errors(prediction, target)).mean()

    @property
    def marks(self) -> str:
        """What tells this set from another: a hash of its images and prompts."""
        found = hashlib.sha256()
        for image in self._images:
            found.update(image.image.tobytes())
            found.update(repr((image.image.size, image.prompt, image.sizes)).encode())
        return found.hexdigest()

    def sources(self, number: int) -> list[str]:
        """The files that a batch's images come from."""
        return [self._images[sample.index].source for sample in self._share(number)]

    def _share(self, number: int) -> list[Sample]:
        size, rank = self._config.train_batch_size, self._accelerator.process_index
        return self._order.batch(number)[rank * size : (rank + 1) * size]

    def _latents_and_noise(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, noise and noise levels, each the same whatever batch or process its image is in."""
        latents, noises, levels = [], [], []
        for sample in samples:
            generator = generator_for(self._config.seed, *sample.place)
            latents.append(self._latents.sample(sample.index, generator))
            noise = torch.randn(latents[-1].shape, generator=generator)
            if self._config.noise_offset:
                noise += self._config.noise_offset * torch.randn(len(noise), 1, 1, generator=generator)
            noises.append(noise)
            levels.append(self._level(self._images[sample.index].image.size, generator))
        return torch.stack(latents), torch.stack(noises), torch.tensor(levels)

    def _level(self, size: Size, generator: torch.Generator) -> int | float:
        """A random noise level for an image of that size."""
        config, family = self._config, self._family
        place = draw_place(
            config.timestep_sampling or self._objective.sampling,
            generator,
            mean=config.logit_mean,
            std=config.logit_std,
            mode_scale=config.mode_scale,
        )
        tokens = family.tokens(size[1], size[0])
        shift = family.shift(tokens) if config.timestep_shift is None else config.timestep_shift
        if config.shift_by_size:
            shift *= (tokens / family.tokens(family.resolution, family.resolution)) ** 0.5
        return self._objective.level(place, shift)

    def _errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Of each image, the mean over its elements, (batch), float32."""
        difference = prediction.float() - target.float()
        if self._config.loss_type == "l2":
            errors = difference.square()
        else:
            c = self._config.huber_c
            errors = 2 * c * ((difference.square() + c * c).sqrt() - c)
        return errors.mean(dim=(1, 2, 3))


def free_encoders(pipe: Any, config: TrainingConfig) -> None:
    """Take out of a pipeline, memory and all, what no step runs once all `Batches` are made.

    That is the autoencoder, and text encoders unless they are trained; nothing where they have to run in each step.
    The pipeline can then be trained and its adapter saved, but it draws no pictures.
    """
    if config.cache == "none":
        return
    idle = [pipe.vae, *([] if config.train_text_encoder else text_encoders(pipe))]
    for name, module in list(pipe.components.items()):
        if any(module is one for one in idle):
            setattr(pipe, name, None)
    forget(idle)  # which knows their weights
    for module in idle:
        nn.Module.to(module, device="meta")  # whoever still has it, it takes no memory


def text_encoders(pipe: Any) -> list[nn.Module]:
    """The text encoders that a pipeline has."""
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    return [module for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)]
