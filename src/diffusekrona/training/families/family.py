"""What differs between families of models: how prompts and images are encoded, and how the denoiser is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import UnsupportedPipelineError


class Family(ABC):
    """A pipeline of one family. A family says what is not as it is here; `register_family` makes it known.

    A prompt is told as tensors by name. Those of one prompt have no batch dimension; where prompts differ in length,
    it is their first, and a batch is padded with zeros at the end. A family that has to know where the padding begins
    keeps a mask among them.

    Args:
        pipe: the pipeline. It is not changed.

    Raises:
        UnsupportedPipelineError: the denoiser does not take what the autoencoder gives, such as an inpainting model's.
    """

    NAME: ClassVar[str]
    """What people call the models."""
    DENOISER: ClassVar[str]
    """Class of the denoiser in Diffusers."""
    PART: ClassVar[str] = "transformer"
    """The denoiser's name in a pipeline."""
    PATCH: ClassVar[int] = 1
    """Elements of a side of the latents that the pipeline makes one token of, before it calls the denoiser."""
    VIDEO: ClassVar[bool] = False
    """Whether the autoencoder is one of videos, to which an image is a single frame."""

    TOKENS: ClassVar[tuple[str, int] | None] = None
    """The tokenizer of the encoder that reads the most of a prompt, and its number of tokens, with those of a template;
    None for any number."""
    guidance: float = 1.0
    """Guidance that a guidance-distilled denoiser is told in training."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        taken, given = self.denoiser.config.in_channels, self.latent_channels
        if taken != given * self.PATCH**2:
            raise UnsupportedPipelineError(
                f"The denoiser of {type(pipe).__name__} takes {taken} channels, but its autoencoder gives {given}"
                f"{f' in patches of {self.PATCH} x {self.PATCH}' if self.PATCH > 1 else ''}. "
                "Inpainting, depth and upscaling models are not supported; use the text-to-image model."
            )

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer."""
        return getattr(self.pipe, self.PART)

    @property
    def dtype(self) -> torch.dtype:
        """That most of the denoiser's frozen weights have, which it is given latents in; packed ones do not count."""
        return _commonest_dtype(self.denoiser)

    @property
    def latent_channels(self) -> int:
        """Channels of what the autoencoder gives."""
        config = self.pipe.vae.config
        return int(config.get("latent_channels") or config.get("z_dim"))

    @property
    def factor(self) -> int:
        """Pixels of a side that become one element of the latents."""
        return int(self.pipe.vae_scale_factor)

    @property
    def reduction(self) -> int:
        """Pixels of a side that become one element of what the denoiser computes on; sides are multiples of it."""
        return int(self.factor * self.PATCH * (self.denoiser.config.get("patch_size") or 1))

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the denoiser was trained on, or that its pipeline draws by default."""
        size = self.denoiser.config.get("sample_size") or getattr(self.pipe, "default_sample_size", None)
        if size is None:
            raise UnsupportedPipelineError(
                f"The configuration of {type(self.pipe).__name__} does not say at which size it was trained, as its "
                "sample_size is null. Give resolution."
            )
        return int(size if isinstance(size, int) else min(size)) * self.factor

    def tokens(self, height: int, width: int) -> int:
        """How many tokens the denoiser makes of an image of that height and width in pixels."""
        return (height // self.reduction) * (width // self.reduction)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of what `posterior` gives for images of that height and width in pixels."""
        return self.latent_channels, height // self.factor, width // self.factor

    def shift(self, tokens: int) -> float:
        """By which the pipeline shifts a flow's noise levels when it draws an image of so many tokens.

        A level σ becomes shift · σ / (1 + (shift − 1) · σ) (Esser et al., 2024, equation 23).
        """
        return scheduled_shift(self.pipe.scheduler.config, tokens)

    def prepare(self, prompts: list[str]) -> str:
        """Be told all prompts that will be encoded; a text that tells encodings made for others apart from these."""
        return ""

    def unread(self, prompt: str) -> str:
        """The end of a prompt that is beyond what the text encoders read; mostly nothing."""
        if self.TOKENS is None or (tokenizer := getattr(self.pipe, self.TOKENS[0], None)) is None:
            return ""
        inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of images and texts
        tokens = inner(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
        room = self.TOKENS[1] - self.taken(tokenizer)
        return str(inner.decode(tokens[room:], skip_special_tokens=True)).strip()

    def taken(self, tokenizer: Any) -> int:
        """How many of the tokens are not a prompt's: special ones, or those of a template before it."""
        return int(tokenizer.num_special_tokens_to_add())

    @abstractmethod
    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """All that the denoiser is told of prompts, each tensor with a row per prompt."""

    @abstractmethod
    def example(self, count: int) -> dict[str, Tensor]:
        """Tensors of the shapes that `encode` gives for so many prompts at most, without meaning.

        No prompt is padded then, and a mask may be left out, if `predict` can do without.
        """

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images, as the denoiser has them.

        Args:
            pixels: (images, 3, height, width) in [-1, 1].

        Returns:
            two tensors of (images, channels, height, width).
        """
        found = self.pipe.vae.encode(pixels.unsqueeze(2) if self.VIDEO else pixels).latent_dist
        mean, std = (part.squeeze(2) if self.VIDEO else part for part in (found.mean, found.std))
        shift, scale = normalisation(self.pipe.vae.config, mean)
        return (mean - shift) * scale, std * scale

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the denoiser says of noisy latents: a diffusion's prediction, or a flow's velocity, noise − latents.

        Args:
            noisy: (batch, channels, height, width).
            timesteps: (batch), from 0 to the scheduler's number of training timesteps.
            text: what `encode` gave, with a row per latent.
            sizes: (batch, 6), original height and width, crop top and left, target height and width.

        Returns:
            a tensor shaped like the noisy latents.
        """


def template_length(tokenizer: Any, message: Any, *before: Mapping[str, Any], **options: Any) -> int:
    """How many tokens a chat's template puts before a prompt.

    Args:
        tokenizer: with the template.
        message: of a text, the content of the message that is the user's.
        before: messages that come first, such as the system's.
        options: of the template.
    """
    mark = "prompt"
    chat = [*before, {"role": "user", "content": message(mark)}]
    start, *_ = tokenizer.apply_chat_template(chat, tokenize=False, **options).rpartition(mark)
    return text_length(tokenizer, start)


def text_length(tokenizer: Any, text: str) -> int:
    """How many tokens a text is, without special ones at its start and end."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of images and texts
    return len(inner(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def packed(latents: Tensor) -> Tensor:
    """Patches of 2 x 2 as tokens: (batch, channels, height, width) to (batch, patches, channels · 4)."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The opposite of `packed`, for latents of that shape."""
    rows, columns = shape[-2] // 2, shape[-1] // 2
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)


def normalisation(config: Mapping[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """What to subtract from latents and then multiply them by, broadcast over (batch, channels, height, width)."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    factor, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
    if mean is None or std is None:
        return torch.full_like(like, shift), torch.full_like(like, factor)
    return like.new_tensor(mean).view(1, -1, 1, 1), factor / like.new_tensor(std).view(1, -1, 1, 1)


def scheduled_shift(config: Mapping[str, Any], tokens: int) -> float:
    """By which a flow's scheduler shifts noise levels for an image of so many tokens.

    Schedulers shift by a constant, or by a function of the number of tokens: exponential or linear in a line through
    two points of their configuration.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    line = low + (high - low) * (tokens - least) / (most - least)
    return float(line if config.get("time_shift_type") == "linear" else torch.tensor(line).exp())


def _commonest_dtype(denoiser: nn.Module) -> torch.dtype:
    parameters = list(denoiser.parameters())
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point()]
    sizes: Counter[torch.dtype] = Counter()
    for parameter in frozen or [p for p in parameters if p.is_floating_point()]:
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]
