"""TrainingConfig: what the user chooses about a DreamBooth run, checked where it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import TrainingConfigError

Precision = Literal["no", "fp16", "bf16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults are the paper's: about 1000 steps at 5e-4 (Sections 4.1, D.3, D.4).

    Args:
        steps: optimizer steps. Simple subjects are learnt by 500, intricate ones by 1000 (Appendix D.4).
        learning_rate: of AdamW. From 1e-4 to 1e-3 works; above, prompts are ignored (Appendix D.3).
        batch_size: images per forward pass; may exceed the number of images, which are then drawn repeatedly.
        gradient_accumulation_steps: batches whose gradients are averaged into one optimizer step.
        resolution: side of the square training images in pixels; None takes the pipeline's own.
        seed: of everything random in a run. On a CPU, equal seeds give equal factors, bit for bit.
        lr_schedule: how the learning rate runs over the steps; the name of a Diffusers schedule.
        lr_warmup_steps: steps over which the learning rate rises from zero, in the schedules that have that.
        weight_decay: of AdamW.
        max_grad_norm: gradients longer than this are scaled down to it; None leaves them alone.
        snr_gamma: weights the loss by Min-SNR with this γ (usually 5); None weights all noise levels alike.
        mixed_precision: "no", "fp16" (GPU only) or "bf16": the type that matrix products are computed in. The
            factors, their gradients and the loss are always float32.
        horizontal_flip: show each image mirrored half of the time. Not for subjects with lettering.
        text_encoders: adapt the text encoders' attention, too. They are then run in every step.

    Raises:
        TrainingConfigError: a value that no run could use.
    """

    steps: int = 1000
    learning_rate: float = 5e-4
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    resolution: int | None = None
    seed: int = 0
    lr_schedule: Schedule = "constant"
    lr_warmup_steps: int = 0
    weight_decay: float = 1e-2
    max_grad_norm: float | None = 1.0
    snr_gamma: float | None = None
    mixed_precision: Precision = "no"
    horizontal_flip: bool = False
    text_encoders: bool = False

    def __post_init__(self) -> None:
        _check_whole("steps", self.steps, 1)
        _check_whole("batch_size", self.batch_size, 1)
        _check_whole("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        _check_whole("seed", self.seed, 0)
        _check_whole("lr_warmup_steps", self.lr_warmup_steps, 0)
        if self.resolution is not None:
            _check_whole("resolution", self.resolution, 1)
        _check_above_zero("learning_rate", self.learning_rate)
        if self.weight_decay != 0:
            _check_above_zero("weight_decay", self.weight_decay)
        if self.max_grad_norm is not None:
            _check_above_zero("max_grad_norm", self.max_grad_norm)
        if self.snr_gamma is not None:
            _check_above_zero("snr_gamma", self.snr_gamma)
        _check_choice("mixed_precision", self.mixed_precision, get_args(Precision))
        _check_choice("lr_schedule", self.lr_schedule, get_args(Schedule))
        self._check_warmup()

    def _check_warmup(self) -> None:
        if self.lr_warmup_steps and self.lr_schedule == "constant":
            raise TrainingConfigError(
                f"lr_schedule 'constant' has no warm-up, but lr_warmup_steps is {self.lr_warmup_steps}. "
                "Use 'constant_with_warmup', or leave lr_warmup_steps out."
            )
        if self.lr_warmup_steps >= self.steps > 1:
            raise TrainingConfigError(
                f"lr_warmup_steps ({self.lr_warmup_steps}) must be below steps ({self.steps}), "
                "or the learning rate never reaches its value."
            )


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TrainingConfigError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def _check_above_zero(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise TrainingConfigError(f"{name} must be a finite number above 0, not {value!r}.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise TrainingConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")
