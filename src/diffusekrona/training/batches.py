"""The loss of each batch of a run: which images, which noise and how much of it; what the denoiser says."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..errors import TrainingConfigError
from ..tuner.components import forget
from .config import TrainingConfig
from .data import Size, TrainingImage
from .encoding import LatentPosteriors, Texts
from .families import Family
from .objective import objective_of
from .randomness import Order, Sample, generator_for
from .timesteps import draw_place
from .wordings import all_wordings, drawn_wording

_log = logging.getLogger(__name__)


AsBase = Callable[[], AbstractContextManager[None]]
"""Makes a pipeline the base's for a while, as if nothing of it were trained."""


class _Drawn(NamedTuple):
    """A sample of a batch: latents and noise (channels, height, width), its noise level, and what is said of it."""

    image: TrainingImage
    latents: Tensor
    noise: Tensor
    level: int | float
    wording: str
    mask: Tensor | None


class Asked(NamedTuple):
    """What the denoiser is asked for a batch, on the device.

    Attributes:
        latents: (batch, channels, height, width).
        noise: shaped like them.
        levels: of the noise, (batch).
        noisy: latents with noise, in the denoiser's type.
        timesteps: what the denoiser is told of the levels.
        wordings: a prompt for each image.
        sizes: what SDXL is told of them, (batch, 6).
        masks: of each image, (1, height, width), or None.
    """

    latents: Tensor
    noise: Tensor
    levels: Tensor
    noisy: Tensor
    timesteps: Tensor
    wordings: list[str]
    sizes: Tensor
    masks: list[Tensor | None]


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
        more_prompts: what else will be asked for, beside the images' own prompts.
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
        more_prompts: Sequence[str] = (),
    ) -> None:
        self._family, self._images, self._config, self._accelerator = family, images, config, accelerator
        self._dtype = family.dtype  # it takes as long as a small step to find out
        device = accelerator.device
        self._objective = objective_of(
            pipe.scheduler, device, snr_gamma=config.snr_gamma, weighting=config.loss_weighting
        )
        self._sampling = config.timestep_sampling or self._objective.sampling
        if self._sampling != "logit_normal" and (config.logit_mean, config.logit_std) != (0.0, 1.0):
            raise TrainingConfigError(
                "logit_mean and logit_std are used only with timestep_sampling: logit_normal, and it is "
                f"{self._sampling} for this base. Set that, or leave them out."
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
        _tell_unread(family, images)
        self.texts = Texts(
            family,
            [*all_wordings([image.prompt for image in images], config), *more_prompts],
            text_encoders(pipe),
            trained=config.train_text_encoder,
            device=device,
            keep=config.cache,
            folder=folder,
        )

    def loss(self, number: int) -> Tensor:
        """Loss of a batch, a float32 scalar with gradients."""
        asked = self.asked(number)
        return self.loss_of(asked, self.answer(asked), self.target(asked))

    def kept(self, number: int, prompt: str, as_base: AsBase) -> Tensor:
        """How far a batch's predictions for another prompt are from the base's own, a scalar with gradients.

        The images, the noise and its levels are those of `loss`.

        Args:
            number: of the batch.
            prompt: what the base shall go on drawing as before, such as the name of the subject's class; it is one of
                the set's `more_prompts`.
            as_base: makes the pipeline the base's for a while.
        """
        asked = self.asked(number, prompt)
        with as_base(), torch.no_grad():
            target = self.answer(asked)
        return self.loss_of(asked, self.answer(asked), target)

    def asked(self, number: int, prompt: str | None = None) -> Asked:
        """What the denoiser is asked for a batch: with the images' own prompts, or with another, and then no masks."""
        drawn = [self._draw(sample) for sample in self._share(number)]
        device = self._accelerator.device
        levels = torch.tensor([one.level for one in drawn], device=device)
        latents, noise = (
            torch.stack(each).to(device) for each in zip(*((d.latents, d.noise) for d in drawn), strict=True)
        )
        return Asked(
            latents,
            noise,
            levels,
            self._objective.add_noise(latents, noise, levels).to(self._dtype),
            self._objective.timesteps(levels),
            [one.wording if prompt is None else prompt for one in drawn],
            torch.tensor([one.image.sizes for one in drawn], dtype=torch.float32, device=device),
            [one.mask if prompt is None else None for one in drawn],
        )

    def answer(self, asked: Asked) -> Tensor:
        """The denoiser's prediction, shaped like the latents."""
        with self._accelerator.autocast():
            return self._family.predict(asked.noisy, asked.timesteps, self.texts(asked.wordings), asked.sizes)

    def target(self, asked: Asked) -> Tensor:
        """What the prediction should be."""
        return self._objective.target(asked.latents, asked.noise, asked.levels)

    def loss_of(self, asked: Asked, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean error of a prediction, weighted by noise levels, a float32 scalar."""
        errors = self._errors(prediction, target, asked.masks)
        return (self._objective.weights(asked.levels) * errors).mean()

    @property
    def marks(self) -> str:
        """What tells this set from another: a hash of its images and prompts."""
        found = hashlib.sha256()
        for image in self._images:
            found.update(image.image.tobytes())
            found.update(repr((image.image.size, image.prompt, image.sizes)).encode())
            found.update(b"" if image.mask is None else image.mask.tobytes())
        return found.hexdigest()

    def sources(self, number: int) -> list[str]:
        """The files that a batch's images come from."""
        return [self._images[sample.index].source for sample in self._share(number)]

    def _share(self, number: int) -> list[Sample]:
        size, rank = self._config.train_batch_size, self._accelerator.process_index
        return self._order.batch(number)[rank * size : (rank + 1) * size]

    def _draw(self, sample: Sample) -> _Drawn:
        """All that is random of a sample, which is the same whatever batch or process it is in."""
        image, generator = self._images[sample.index], generator_for(self._config.seed, *sample.place)
        latents, mirrored = self._latents.sample(sample.index, generator)
        noise = torch.randn(latents.shape, generator=generator)
        if self._config.noise_offset:
            noise += self._config.noise_offset * torch.randn(len(noise), 1, 1, generator=generator)
        level = self._level(image.image.size, generator)
        mask = None if image.mask is None else _shrunk(image.mask, mirrored, latents)
        return _Drawn(image, latents, noise, level, drawn_wording(image.prompt, self._config, generator), mask)

    def _level(self, size: Size, generator: torch.Generator) -> int | float:
        """A random noise level for an image of that size."""
        config, family = self._config, self._family
        place = draw_place(
            self._sampling,
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

    def _errors(self, prediction: Tensor, target: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
        """Of each image, the mean over its elements, or over those that its mask lets count, (batch), float32."""
        difference = prediction.float() - target.float()
        if self._config.loss_type == "l2":
            errors = difference.square()
        else:
            c = self._config.huber_c
            errors = 2 * c * ((difference.square() + c * c).sqrt() - c)
        if all(mask is None for mask in masks):
            return errors.mean(dim=(1, 2, 3))
        shares = torch.stack([torch.ones_like(errors[0, :1]) if mask is None else mask.to(errors) for mask in masks])
        return (errors * shares).mean(dim=(1, 2, 3)) / shares.mean(dim=(1, 2, 3)).clamp(min=1e-6)


def _tell_unread(family: Family, images: Sequence[TrainingImage]) -> None:
    """Log a warning for each prompt that is longer than what the text encoders read."""
    for prompt, source in {image.prompt: image.source for image in images}.items():
        if unread := family.unread(prompt):
            _log.warning("The prompt of %s is longer than %s reads; cut off is: %s", source, family.NAME, unread)


def _shrunk(mask: Image.Image, mirrored: bool, latents: Tensor) -> Tensor:
    """A mask at the size of latents, (1, height, width), from 0 to 1."""
    shown = ImageOps.mirror(mask) if mirrored else mask
    small = shown.resize((latents.shape[-1], latents.shape[-2]), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).unsqueeze(0)


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
        for part in module.modules():
            for name, weight in part.named_parameters(recurse=False):
                if type(weight) is not nn.Parameter:  # quantized ones cannot be moved there
                    gone = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
                    part.register_parameter(name, gone)
        nn.Module.to(module, device="meta")  # whoever still has it, it takes no memory


def text_encoders(pipe: Any) -> list[nn.Module]:
    """The text encoders that a pipeline has."""
    return list(_named_encoders(pipe).values())


def trained_encoders(pipe: Any, config: TrainingConfig) -> list[nn.Module]:
    """Those of a pipeline's text encoders that are trained. If one is, the others run in each step, too, but frozen.

    Raises:
        TrainingConfigError: one is named that the pipeline does not have.
    """
    if not config.train_text_encoder:
        return []
    found = _named_encoders(pipe)
    chosen = config.text_encoders_to_train or list(found)
    if unknown := [name for name in chosen if name not in found]:
        raise TrainingConfigError(
            f"text_encoders_to_train names {', '.join(unknown)}, but the text encoders of this pipeline are "
            f"{', '.join(found) or 'none'}."
        )
    return [module for name, module in found.items() if name in chosen]


def _named_encoders(pipe: Any) -> dict[str, nn.Module]:
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    return {name: module for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)}
