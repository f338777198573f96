"""How to train, and what becomes of each image: each setting with its type, bounds, default and meaning."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..errors import KronAError, TrainingConfigError
from ..schema import SettingsModel, TextList

Precision = Literal["no", "fp16", "bf16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
OnNonFinite = Literal["stop", "skip"]
Keep = Literal["memory", "disk", "none"]
Offload = Literal["none", "blocks", "all"]
Sampling = Literal["uniform", "logit_normal", "mode"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]
LossType = Literal["l2", "huber"]
OnSmall = Literal["upscale", "skip", "stop"]
OnBadImage = Literal["stop", "skip"]

ENCODER_RATES = ("text_encoder_lr", "text_encoder_2_lr", "text_encoder_3_lr")
"""Learning rates of the text encoders, by their names in a pipeline."""


_USED_BY: dict[str, tuple[str, object]] = {
    "huber_c": ("loss_type", "huber"),
    "keep_tags": ("shuffle_tags", True),
    "lr_num_cycles": ("lr_scheduler", "cosine_with_restarts"),
    "lr_power": ("lr_scheduler", "polynomial"),
    "mode_scale": ("timestep_sampling", "mode"),
    "text_encoders_to_train": ("train_text_encoder", True),
    "train_denoiser": ("train_text_encoder", True),
}
"""Settings that have a meaning only where another one has a certain value."""


class TrainingSettings(SettingsModel):
    """A group of a run's settings; those that no run could use are a `TrainingConfigError`."""

    error: ClassVar[type[KronAError]] = TrainingConfigError


class TrainingConfig(TrainingSettings):
    """How to train. The defaults are the paper's: about 1000 steps at 5e-4 (Sections 4.1, D.3, D.4).

    Raises:
        TrainingConfigError: a value that no run could use.
    """

    max_train_steps: int = Field(default=1000, ge=1)
    """Optimizer steps. Simple subjects are learnt by 500, intricate ones by 1000 (Appendix D.4)."""
    num_train_epochs: int | None = Field(default=None, ge=1)
    """Number of times that each image is used, in place of max_train_steps."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Learning rate. From 1e-4 to 1e-3 works; above, prompts are ignored (Appendix D.3). Prodigy wants 1."""
    text_encoder_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the text encoders' adapters; by default it is learning_rate."""
    text_encoder_2_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the second text encoder, in SDXL and SD3; by default it is text_encoder_lr."""
    text_encoder_3_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the third text encoder, in SD3; by default it is text_encoder_lr."""
    loraplus_lr_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of B divided by that of A, for KronA and LoRA; the λ of LoRA+."""
    train_text_encoder: bool = False
    """Adapt the text encoders' attention, too, as the paper does for Stable Diffusion 1.x; they then run in
    each step."""
    text_encoders_to_train: TextList | None = Field(default=None, min_length=1, examples=[["text_encoder_2"]])
    """Name of a text encoder that train_text_encoder adapts, such as "text_encoder_2"; as a flag it is repeatable. The
    others stay frozen, but run in each step, too. By default all are adapted."""
    train_denoiser: bool = True
    """Adapt the denoiser; without, train_text_encoder adapts text encoders alone."""
    train_batch_size: int = Field(default=1, ge=1)
    """Images per pass and process. Where there are fewer images, some are drawn repeatedly."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Passes whose gradients are averaged into one optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""
    offload: Offload = "none"
    """Where the denoiser's frozen blocks wait until they are needed, one at a time: "none" for on the device, "blocks"
    for in CPU memory, or "all" for in files, which takes least memory and, on a CPU too, most time."""
    mixed_precision: Precision = "no"
    """Type that matrix products are computed in: "no" for float32, "fp16" (on a GPU only) or "bf16". The factors, their
    gradients and the loss are always float32."""
    cache: Keep = "memory"
    """Where encoded images and prompts stay: "memory", "disk", or "none" to encode them in every step."""
    random_flip: bool = False
    """Show each image mirrored half of the time. It does not suit subjects with lettering."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random in a run. On a CPU, equal seeds give equal factors, bit for bit."""
    optimizer: str = "adamw"
    """Optimizer by its name: of torch.optim, such as "AdamW" or "SGD"; of bitsandbytes, such as "adamw8bit" or
    "paged_adamw8bit"; "prodigy"; or of pytorch-optimizer, such as "came", "lion" or "muon"."""
    optimizer_args: dict[str, Any] = Field(default_factory=dict, examples=[{"weight_decay": 0.01}])
    """Arguments of the optimizer by their names, such as weight_decay=0.01; as a flag it is repeatable."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the first moment, the mean of the gradients, in AdamW and Prodigy; others have optimizer_args."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of the second moment, the mean of the squared gradients, in AdamW and Prodigy."""
    adam_weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay of AdamW and Prodigy; 0 turns it off."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Number that AdamW and Prodigy add to the root of the second moment, against division by zero."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Norm that longer gradients are scaled down to; 0 leaves all of them alone."""
    lr_scheduler: Schedule = "constant"
    """Course of the learning rate over the steps, by the name of a Diffusers schedule."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from zero; "constant" has no such steps."""
    lr_num_cycles: int = Field(default=1, ge=1)
    """Number of cycles of the schedule "cosine_with_restarts"."""
    lr_power: float = Field(default=1.0, gt=0)
    """Exponent of the schedule "polynomial"; 1 makes it linear."""
    snr_gamma: float | None = Field(default=None, gt=0)
    """The γ of Min-SNR, usually 5, by which the loss is weighted; by default all noise levels count alike."""
    timestep_sampling: Sampling | None = None
    """How noise levels are drawn: "uniform", "logit_normal" or "mode"; by default "uniform" for diffusions and
    "logit_normal" for flows."""
    logit_mean: float = 0.0
    """Mean of the normal distribution of "logit_normal". Above 0, more noise is likelier, as in Stable Diffusion 3's
    paper; Diffusers' scripts count the other way."""
    logit_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal distribution of "logit_normal"."""
    mode_scale: float = Field(default=1.29, ge=-1, le=2 / (math.pi - 2))
    """Scale of "mode": above 0, middling noise levels are likelier, below 0 the ends."""
    timestep_shift: float | None = Field(default=None, gt=0)
    """Shift of the noise levels: above 1, more noise is likelier. By default it is that by which the base's pipeline
    draws, which depends on an image's size for some bases."""
    shift_by_size: bool = False
    """Multiply the shift of the noise levels by the root of an image's tokens over those of the base's own
    resolution, for bases that do not shift by size themselves."""
    loss_weighting: Weighting = "none"
    """Weight of each noise level in a flow's loss: "none", "sigma_sqrt" or "cosmap"."""
    loss_type: LossType = "l2"
    """What becomes of an error: "l2" for its square, or "huber" for the pseudo-Huber loss, in which large errors count
    less."""
    huber_c: float = Field(default=0.1, gt=0)
    """Size of the errors from which on the pseudo-Huber loss is linear rather than quadratic."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Guidance that guidance-distilled bases, such as FLUX.1 dev, are told in training."""
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps in which an image is shown without its prompt; 0.05 to 0.1 keeps guidance working."""
    shuffle_tags: bool = False
    """Show the tags of a caption, which are parted by commas, in another order each time."""
    keep_tags: int = Field(default=1, ge=0)
    """Number of tags at the start of a caption that stay where they are."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Standard deviation of noise that is the same all over a channel; 0.05 to 0.1 lets a diffusion model learn very
    bright and very dark pictures."""
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    """Decay of an exponential moving average of the factors, such as 0.99, which is then saved instead of them; by
    default there is none."""
    prior_loss_weight: float = Field(default=1.0, ge=0)
    """Weight of the class's loss beside the subject's, with prior preservation or prior_prompt."""
    prior_prompt: str | None = None
    """Name of the subject's class, such as "a toy", that the base shall go on drawing as before, without class images:
    the base's own predictions for it are learnt beside the subject, at prior_loss_weight."""
    validation_loss_steps: int = Field(default=50, ge=1)
    """Number of steps after which the loss of held-out images is computed each time."""
    on_non_finite: OnNonFinite = "stop"
    """What to do when a loss or a gradient is not finite: "stop", or "skip" the step."""
    checkpointing_steps: int = Field(default=500, ge=1)
    """Number of steps after which the state of the run is saved each time."""
    checkpoints_total_limit: int = Field(default=2, ge=1)
    """Number of checkpoints that are kept, the newest ones."""

    def __hash__(self) -> int:
        return hash(tuple(value for _, value in self if isinstance(value, Hashable)))

    @property
    def adapted_encoders(self) -> bool | list[str]:
        """Which text encoders are adapted, as `inject_krona` takes it."""
        return self.text_encoders_to_train or self.train_text_encoder

    def in_steps(self, images: int, processes: int) -> TrainingConfig:
        """The same with the number of steps in which so many images are each used `num_train_epochs` times."""
        if self.num_train_epochs is None:
            return self
        per_step = self.train_batch_size * self.gradient_accumulation_steps * processes
        return self.replace(max_train_steps=math.ceil(self.num_train_epochs * images / per_step), num_train_epochs=None)

    @model_validator(mode="after")
    def _check_warmup(self) -> TrainingConfig:
        if (
            self.num_train_epochs is not None
            and self.max_train_steps != type(self).model_fields["max_train_steps"].default
        ):
            raise TrainingConfigError("num_train_epochs and max_train_steps both say when to stop. Give one of them.")
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
        return self

    @model_validator(mode="after")
    def _check_used(self) -> TrainingConfig:
        for name, (other, value) in _USED_BY.items():
            if getattr(self, name) != type(self).model_fields[name].default and getattr(self, other) != value:
                raise TrainingConfigError(
                    f"{name} is given, but it is used only with {other}: {str(value).lower()}. "
                    "Set that, or leave it out."
                )
        return self

    @model_validator(mode="after")
    def _check_encoder_rates(self) -> TrainingConfig:
        for name in ENCODER_RATES:
            if getattr(self, name) is not None and not self.train_text_encoder:
                raise TrainingConfigError(
                    f"{name} is given, but the text encoders are not trained: turn train_text_encoder on."
                )
            chosen = self.text_encoders_to_train
            if getattr(self, name) is not None and chosen is not None and not self._has_use_for(name, chosen):
                raise TrainingConfigError(
                    f"{name} is given, but it is the rate of none of the text_encoders_to_train, "
                    f"{', '.join(chosen)}. Name its text encoder there, or leave it out."
                )
        return self

    def _has_use_for(self, rate: str, encoders: list[str]) -> bool:
        """Whether a learning rate is that of one of some text encoders; the first one's is also that of others."""
        of_its_own = rate.removesuffix("_lr") in encoders
        others = [name for name in encoders if getattr(self, f"{name}_lr", None) is None]
        return of_its_own or (rate == ENCODER_RATES[0] and bool(others))


class ImageSettings(TrainingSettings):
    """What becomes of each image."""

    resolution: int | None = Field(default=None, ge=1)
    """Side of the training images in pixels; by default it is the base's own. With buckets, it is the root of their
    area."""
    center_crop: bool = True
    """Cut out the middle of each image; otherwise a random part, another one for each repeat."""
    repeats: int = Field(default=1, ge=1)
    """Number of times that each image is used in an epoch."""
    aspect_ratio_buckets: bool = False
    """Cut each image to the nearest of several sizes of the same area, instead of squares."""
    extra_resolutions: list[int] = Field(default_factory=list, examples=[[768]])
    """Another side that each image is trained at, too, beside resolution; as a flag it is repeatable."""
    masked_loss: bool = False
    """Let the loss count only where an image's mask is white. The mask is a file such as dog-masklabel.png or
    dog.mask.png beside dog.png, or else what is not transparent."""
    on_small: OnSmall = "upscale"
    """What to do about an image that is smaller than the resolution: "upscale" or "skip" it with a warning, or
    "stop"."""
    on_bad_image: OnBadImage = "stop"
    """What to do about an image that cannot be read: "stop", or "skip" it with a warning."""
