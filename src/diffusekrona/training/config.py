"""What a setting may be, checked where it is made, with errors that name it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import TrainingConfigError
from .encoding import Keep


def check_whole(name: str, value: object, least: int) -> None:
    """Raise `TrainingConfigError` unless a value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TrainingConfigError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def check_number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> None:
    """Raise `TrainingConfigError` unless a value is a number within these limits."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not above < value < below or value < least:  # type: ignore[operator]
        start = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
        end = f" and below {below:g}" if below < math.inf else ""
        raise TrainingConfigError(f"{name} must be a finite number {start}{end}, not {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raise `TrainingConfigError` unless a value is true or false."""
    if not isinstance(value, bool):
        raise TrainingConfigError(f"{name} must be true or false, not {value!r}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `TrainingConfigError` unless a value is one of these."""
    if value not in choices:
        raise TrainingConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")


Precision = Literal["no", "fp16", "bf16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Optimizer = Literal["adamw", "adamw8bit", "prodigy"]
OnNonFinite = Literal["stop", "skip"]

ENCODER_RATES = ("text_encoder_lr", "text_encoder_2_lr", "text_encoder_3_lr")
"""Learning rates of the text encoders, by their names in a pipeline."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults are the paper's: about 1000 steps at 5e-4 (Sections 4.1, D.3, D.4).

    Args:
        max_train_steps: Optimizer steps. Simple subjects are learnt by 500, intricate ones by 1000 (Appendix D.4).
        learning_rate: Learning rate. From 1e-4 to 1e-3 works; above, prompts are ignored (Appendix D.3). Prodigy
            wants 1.
        text_encoder_lr: Learning rate of the text encoders' adapters; by default the same.
        text_encoder_2_lr: That of the second text encoder, of SDXL and SD3; by default text_encoder_lr.
        text_encoder_3_lr: That of the third one, of SD3; by default text_encoder_lr.
        loraplus_lr_ratio: Learning rate of B, of KronA and of LoRA, over that of A; LoRA+'s λ.
        train_text_encoder: Adapt the text encoders' attention, too, as the paper does for Stable Diffusion 1.x. They
            are then run in every step.
        train_batch_size: Images per pass and process; may exceed the number of images, which are then drawn repeatedly.
        gradient_accumulation_steps: Passes whose gradients are averaged into one optimizer step.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        mixed_precision: "no", "fp16" (GPU only) or "bf16": the type that matrix products are computed in. The
            factors, their gradients and the loss are always float32.
        cache: Where encoded images and prompts stay: "memory", "disk", or "none" to encode them in every step.
        random_flip: Show each image mirrored half of the time. Not for subjects with lettering.
        seed: Of everything random in a run. On a CPU, equal seeds give equal factors, bit for bit.
        optimizer: "adamw", "adamw8bit" (needs bitsandbytes) or "prodigy" (needs prodigyopt).
        adam_beta1: Of the optimizer's first moment.
        adam_beta2: Of its second moment.
        adam_weight_decay: Of the optimizer.
        adam_epsilon: Of the optimizer.
        max_grad_norm: Gradients longer than this are scaled down to it; 0 leaves them alone.
        lr_scheduler: How the learning rate runs over the steps; the name of a Diffusers schedule.
        lr_warmup_steps: Steps over which the learning rate rises from zero, in the schedules that have that.
        lr_num_cycles: Restarts of "cosine_with_restarts".
        lr_power: Of "polynomial".
        snr_gamma: Weights the loss by Min-SNR with this γ, usually 5; by default all noise levels count alike.
        noise_offset: Standard deviation of noise that is the same all over a channel; 0.05 to 0.1 lets a diffusion
            learn very bright and very dark pictures.
        ema_decay: Keep an exponential moving average of the factors with this decay, such as 0.99, and save that.
        prior_loss_weight: Of the class images' loss beside the subject's (prior preservation).
        on_non_finite: What to do where a loss or a gradient is no finite number: "stop", or "skip" the step.
        checkpointing_steps: Save the state of the run every so many steps.
        checkpoints_total_limit: How many of these to keep, the newest.

    Raises:
        TrainingConfigError: a value that no run could use.
    """

    max_train_steps: int = 1000
    learning_rate: float = 5e-4
    text_encoder_lr: float | None = None
    text_encoder_2_lr: float | None = None
    text_encoder_3_lr: float | None = None
    loraplus_lr_ratio: float = 1.0
    train_text_encoder: bool = False
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: Precision = "no"
    cache: Keep = "memory"
    random_flip: bool = False
    seed: int = 0
    optimizer: Optimizer = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler: Schedule = "constant"
    lr_warmup_steps: int = 0
    lr_num_cycles: int = 1
    lr_power: float = 1.0
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    ema_decay: float | None = None
    prior_loss_weight: float = 1.0
    on_non_finite: OnNonFinite = "stop"
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "lr_num_cycles"):
            check_whole(name, getattr(self, name), 1)
        for name in ("checkpointing_steps", "checkpoints_total_limit"):
            check_whole(name, getattr(self, name), 1)
        for name in ("seed", "lr_warmup_steps"):
            check_whole(name, getattr(self, name), 0)
        for name in ("learning_rate", "loraplus_lr_ratio", "adam_epsilon", "lr_power"):
            check_number(name, getattr(self, name), above=0)
        for name in ("adam_weight_decay", "max_grad_norm", "noise_offset", "prior_loss_weight"):
            check_number(name, getattr(self, name), least=0)
        for name in (*ENCODER_RATES, "snr_gamma"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), least=0, below=1)
        for name in ("train_text_encoder", "gradient_checkpointing", "random_flip"):
            check_flag(name, getattr(self, name))
        for name, choices in (
            ("mixed_precision", Precision),
            ("lr_scheduler", Schedule),
            ("optimizer", Optimizer),
            ("cache", Keep),
            ("on_non_finite", OnNonFinite),
        ):
            check_choice(name, getattr(self, name), get_args(choices))
        self._check_warmup()
        for name in ENCODER_RATES:
            if getattr(self, name) is not None and not self.train_text_encoder:
                raise TrainingConfigError(
                    f"{name} is given, but the text encoders are not trained: train_text_encoder."
                )

    def _check_warmup(self) -> None:
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise TrainingConfigError(
                f"lr_scheduler 'constant' has no warm-up, but lr_warmup_steps is {self.lr_warmup_steps}. "
                "Use 'constant_with_warmup', or leave lr_warmup_steps out."
            )
        if self.lr_warmup_steps >= self.max_train_steps > 1:
            raise TrainingConfigError(
                f"lr_warmup_steps ({self.lr_warmup_steps}) must be below max_train_steps ({self.max_train_steps}), "
                "or the learning rate never reaches its value."
            )
