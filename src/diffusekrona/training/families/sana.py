"""SANA: a flow on latents that are a 32nd of the image on each side, of an autoencoder without randomness."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedPipelineError
from .family import Family, normalisation

TOKENS = 300
"""Of each prompt, padded."""


class Sana(Family):
    """A pipeline with a SANA transformer.

    Raises:
        UnsupportedPipelineError: it is one of SANA-Sprint.
    """

    NAME = "SANA"
    DENOISER = "SanaTransformer2DModel"
    TOKENS = ("tokenizer", TOKENS - 2)  # the pipeline counts two more, as of the instruction

    def taken(self, tokenizer: Any) -> int:
        """None: those of the instruction are not counted."""
        return 0

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if self.denoiser.config.guidance_embeds:
            raise UnsupportedPipelineError(
                f"The transformer of {type(pipe).__name__} is told how strong guidance is, as SANA-Sprint's are, which "
                "draw in one to four steps and are not trained by noise levels. Use the SANA that it was made of."
            )

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Hidden states (prompts, 300, width), and which tokens are no padding (prompts, 300).

        The language model is given the instruction that the pipeline puts before each prompt.
        """
        instruction = signature(self.pipe.__call__).parameters["complex_human_instruction"].default
        hidden, mask, *_ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=device,
            max_sequence_length=TOKENS,
            complex_human_instruction=instruction,
        )
        return {"hidden": hidden, "mask": mask}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of 300 tokens."""
        return {
            "hidden": torch.empty(count, TOKENS, self.denoiser.config.caption_channels, dtype=self.dtype),
            "mask": torch.ones(count, TOKENS, dtype=torch.long),
        }

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The latents themselves, and no deviation from them."""
        latents = self.pipe.vae.encode(pixels).latent
        shift, scale = normalisation(self.pipe.vae.config, latents)
        return (latents - shift) * scale, torch.zeros_like(latents)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the transformer says; it is not told of sizes."""
        velocity: Tensor = self.denoiser(
            noisy,
            encoder_hidden_states=text["hidden"],
            encoder_attention_mask=text["mask"],
            timestep=timesteps * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return velocity
