"""Stable Diffusion 1.x, 2.x and SDXL: a UNet, and for SDXL pooled embeddings and size numbers, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedPipelineError
from ...generation.prompts import chunks_needed, encode_in_chunks
from .family import Family


class StableDiffusion(Family):
    """A pipeline with a UNet.

    Raises:
        UnsupportedPipelineError: its UNet is told more than Stable Diffusion's or SDXL's.
    """

    NAME = "Stable Diffusion 1.x, 2.x and SDXL"
    DENOISER = "UNet2DConditionModel"
    PART = "unet"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        told = pipe.unet.config.addition_embed_type
        if told not in (None, "text_time"):
            raise UnsupportedPipelineError(
                f"The UNet of {type(pipe).__name__} wants {told!r} as additional embedding, "
                "which is neither Stable Diffusion's nor SDXL's."
            )
        self._is_sdxl = told == "text_time"
        self._chunks = 1

    def prepare(self, prompts: list[str]) -> str:
        """Encode all in as many chunks of 77 tokens as the longest takes."""
        self._chunks = chunks_needed(self.pipe, prompts)
        return f"{self._chunks}-" if self._chunks > 1 else ""

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Hidden states (prompts, tokens, width) and, for SDXL, pooled embeddings (prompts, projection)."""
        if self._chunks > 1:
            said = encode_in_chunks(self.pipe, prompts, self._chunks, device)
            return {"hidden": said.hidden} if said.pooled is None else said._asdict()
        outputs = self.pipe.encode_prompt(
            prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        pooled = {"pooled": outputs[2]} if self._is_sdxl else {}
        return {"hidden": outputs[0], **pooled}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of CLIP's 77 tokens, or of as many chunks of them as were asked for."""
        config = self.denoiser.config
        text = {"hidden": torch.empty(count, 77 * self._chunks, config.cross_attention_dim, dtype=self.dtype)}
        if self._is_sdxl:
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            text["pooled"] = torch.empty(count, width, dtype=self.dtype)
        return text

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the UNet says."""
        added = {"added_cond_kwargs": {"text_embeds": text["pooled"], "time_ids": sizes}} if self._is_sdxl else {}
        prediction: Tensor = self.denoiser(
            noisy, timesteps, encoder_hidden_states=text["hidden"], return_dict=False, **added
        )[0]
        return prediction
