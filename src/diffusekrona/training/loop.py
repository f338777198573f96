"""The training loop. It optimizes any parameters of a pipeline on any images and knows no kind of adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn

from .batches import Batches
from .conditioning import check_pipeline
from .config import TrainingConfig
from .data import TrainingImage
from .errors import TrainingConfigError, TrainingDivergedError
from .runtime import accelerator_for, modes_kept, seeded


@dataclass(frozen=True)
class TrainingStep:
    """What is known after each optimizer step.

    Args:
        step: how many are done, from 1.
        steps: how many there will be.
        loss: of this step, averaged over its batches.
        average: mean loss of the last 50 steps, or of all so far; steadier, because noise levels are random.
        learning_rate: that this step used.
        seconds: since the first step began.
    """

    step: int
    steps: int
    loss: float
    average: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run was.

    Args:
        losses: one per optimizer step.
        seconds: that the steps took, without loading and encoding.
        images: how many images it was trained on.
        parameters: how many numbers were trained.
    """

    losses: tuple[float, ...]
    seconds: float
    images: int
    parameters: int

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.losses)

    @property
    def final_loss(self) -> float:
        """Mean over the last 50 steps; one step's loss says little, because its noise levels are random."""
        return _recent_mean(self.losses)


def _recent_mean(losses: Sequence[float], window: int = 50) -> float:
    recent = losses[-window:]
    return sum(recent) / len(recent)


def fit(
    pipe: Any,
    images: Sequence[TrainingImage],
    parameters: Iterable[nn.Parameter],
    config: TrainingConfig,
    on_step: Callable[[TrainingStep], None] | None = None,
) -> TrainingResult:
    """Train parameters of a pipeline's UNet, and of its text encoders if `config.text_encoders`, with AdamW.

    The pipeline is moved to accelerate's device. Its scheduler, its frozen weights and each module's train or
    eval mode are as before when this returns or raises.

    Args:
        pipe: a Stable Diffusion or SDXL pipeline in which nothing but `parameters` requires gradients.
        images: what to learn; see `load_folder` and `prepare_images`.
        parameters: what to optimize, float32.
        config: how.
        on_step: called after every optimizer step; what it raises ends the run.

    Raises:
        UnsupportedPipelineError: the pipeline is of another kind.
        TrainingConfigError: the configuration does not suit the pipeline or the machine.
        TrainingDivergedError: the loss or a parameter is not finite.
    """
    check_pipeline(pipe)
    trained = list(parameters)
    if not trained:
        raise TrainingConfigError("There is nothing to train: no parameters were given.")
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    with (
        accelerator_for(config.mixed_precision) as accelerator,
        seeded(config.seed, accelerator.device) as generator,
        modes_kept(modules),
    ):
        pipe.to(accelerator.device)
        _set_modes(pipe, modules, config.text_encoders)
        source = Batches(pipe, images, config, generator)
        losses, seconds = _run(source, trained, accelerator, config, on_step)
    _check_finite(trained, config)
    return TrainingResult(tuple(losses), seconds, len(images), sum(p.numel() for p in trained))


def _set_modes(pipe: Any, modules: Iterable[nn.Module], text_encoders: bool) -> None:
    for module in modules:
        module.eval()
    pipe.unet.train()
    if text_encoders:
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipe, name, None)
            if encoder is not None:
                encoder.train()


def _run(
    source: Batches,
    parameters: list[nn.Parameter],
    accelerator: Accelerator,
    config: TrainingConfig,
    on_step: Callable[[TrainingStep], None] | None,
) -> tuple[list[float], float]:
    """All optimizer steps; returns their losses and the seconds they took."""
    optimizer = _optimizer(parameters, config)
    schedule = get_scheduler(
        config.lr_schedule,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.steps,
    )
    optimizer = accelerator.prepare(optimizer)
    losses: list[float] = []
    began = time.monotonic()
    for step in range(1, config.steps + 1):
        rate = float(schedule.get_last_lr()[0])
        loss = _gradients(source, accelerator, config.gradient_accumulation_steps)
        if not math.isfinite(loss):
            raise _diverged(f"The loss became {loss} at step {step} of {config.steps}", config)
        if config.max_grad_norm is not None:
            accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        if on_step is not None:
            on_step(TrainingStep(step, config.steps, loss, _recent_mean(losses), rate, time.monotonic() - began))
    return losses, time.monotonic() - began


def _optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    # An adapter is hundreds of small tensors, and one fused call is quicker than a dozen for each of them.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)


def _gradients(source: Batches, accelerator: Accelerator, batches: int) -> float:
    """Add up the gradients of the mean loss over some batches, and return that loss."""
    total = 0.0
    for _ in range(batches):
        loss = source.loss(accelerator) / batches
        accelerator.backward(loss)
        total += loss.item()
    return total


def _check_finite(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> None:
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise _diverged("A trained weight is no longer a finite number", config)


def _diverged(what: str, config: TrainingConfig) -> TrainingDivergedError:
    wider = {"fp16": ' or mixed_precision "bf16"', "bf16": ' or mixed_precision "no"'}
    other = wider.get(config.mixed_precision, "")
    return TrainingDivergedError(
        f"{what}. Nothing was saved. Try a learning rate below {config.learning_rate:g}{other}, "
        "and look for images that are blank or damaged."
    )
