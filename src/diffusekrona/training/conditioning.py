"""Prompts as the UNet wants them: hidden states, and for SDXL a pooled embedding and size numbers, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .data import TrainingImage
from .errors import UnsupportedPipelineError


def check_pipeline(pipe: Any) -> None:
    """Make sure that a pipeline is Stable Diffusion 1.x, 2.x or SDXL, for text to image.

    Raises:
        UnsupportedPipelineError: it is something else.
    """
    name = type(pipe).__name__
    parts = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")
    missing = [part for part in parts if getattr(pipe, part, None) is None]
    if missing or not hasattr(pipe, "encode_prompt"):
        raise UnsupportedPipelineError(
            f"{name} has no {', '.join(missing) or 'encode_prompt'}. "
            "DreamBooth training knows Stable Diffusion 1.x, 2.x and SDXL pipelines."
        )
    taken, given = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if taken != given:
        raise UnsupportedPipelineError(
            f"The UNet of {name} takes {taken} channels, but its autoencoder gives {given}. "
            "Inpainting, depth and upscaling models are not supported; use the text-to-image model."
        )
    if pipe.unet.config.addition_embed_type not in (None, "text_time"):
        raise UnsupportedPipelineError(
            f"The UNet of {name} wants {pipe.unet.config.addition_embed_type!r} as additional embedding, "
            "which is neither Stable Diffusion's nor SDXL's."
        )


class TextConditioning:
    """The UNet's text arguments for any choice of training images.

    Frozen text encoders are run once per distinct prompt, trainable ones at every call and with gradients.

    Args:
        pipe: a pipeline that `check_pipeline` accepts, on the device to train on.
        images: what to train on.
        trainable: whether gradients have to reach the text encoders.
        dtype: of the embeddings given to the UNet.
    """

    def __init__(self, pipe: Any, images: Sequence[TrainingImage], *, trainable: bool, dtype: torch.dtype) -> None:
        self._pipe = pipe
        self._dtype = dtype
        self._prompts = list(dict.fromkeys(image.prompt for image in images))
        self._prompt_of_image = [self._prompts.index(image.prompt) for image in images]
        self._time_ids = _time_ids(images).to(pipe.unet.device) if _is_sdxl(pipe) else None
        self._encoded: tuple[Tensor, Tensor | None] | None = None
        if not trainable:
            with torch.no_grad():
                self._encoded = self._encode(self._prompts)

    def __call__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of the UNet's forward for the images with these indices, in this order.

        `encoder_hidden_states` is (batch, tokens, width). For SDXL `added_cond_kwargs` holds
        `text_embeds` (batch, projection) and `time_ids` (batch, 6).
        """
        chosen = [self._prompt_of_image[index] for index in indices]
        if self._encoded is not None:
            rows, encoded = chosen, self._encoded
        else:
            distinct = sorted(set(chosen))
            rows, encoded = [distinct.index(prompt) for prompt in chosen], self._encode_chosen(distinct)
        hidden, pooled = encoded
        arguments: dict[str, Any] = {"encoder_hidden_states": hidden[rows]}
        if self._time_ids is not None and pooled is not None:
            arguments["added_cond_kwargs"] = {
                "text_embeds": pooled[rows],
                "time_ids": self._time_ids[list(indices)],
            }
        return arguments

    def _encode_chosen(self, prompts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return self._encode([self._prompts[prompt] for prompt in prompts])

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """(prompts, tokens, width) hidden states and, for SDXL, (prompts, projection) pooled embeddings."""
        outputs = self._pipe.encode_prompt(
            prompt=prompts,
            device=self._pipe.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        pooled = outputs[2].to(self._dtype) if _is_sdxl(self._pipe) else None
        return outputs[0].to(self._dtype), pooled


def _is_sdxl(pipe: Any) -> bool:
    return bool(pipe.unet.config.addition_embed_type == "text_time")


def _time_ids(images: Sequence[TrainingImage]) -> Tensor:
    """SDXL's sizes, (images, 6): original height and width, crop top and left, target height and width."""
    rows = [(*image.original_size, *image.crop_top_left, image.image.height, image.image.width) for image in images]
    return torch.tensor(rows, dtype=torch.float32)
