"""Chroma: FLUX.1 made smaller, a flow whose transformer is told which of the text's tokens count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...tuner.compat import recomputing
from .family import Family, packed, unpacked
from .flux import T5_TOKENS, places


class Chroma(Family):
    """A pipeline with a Chroma transformer.

    Its pipeline, in Diffusers 0.42, makes the mask a float one, which attention adds to its scores: what counts is
    preferred, and nothing is masked. Training does as the pipeline that draws.
    """

    NAME = "Chroma"
    DENOISER = "ChromaTransformer2DModel"
    PATCH = 2
    TOKENS = ("tokenizer", T5_TOKENS)

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """T5's hidden states (prompts, 512, width), and 1 for each token of a prompt and one of its padding."""
        hidden, _, mask, *_ = self.pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"hidden": hidden, "mask": mask}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of 512 tokens."""
        width = self.denoiser.config.joint_attention_dim
        return {
            "hidden": torch.empty(count, T5_TOKENS, width, dtype=self.dtype),
            "mask": torch.ones(count, T5_TOKENS, dtype=self.dtype),
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the transformer says; it is not told of sizes."""
        tokens, hidden = packed(noisy), text["hidden"]
        mask = torch.cat([text["mask"], text["mask"].new_ones(tokens.shape[:2])], dim=1)

        def told(block: Callable[..., Any], *inputs: Any) -> tuple[Any, ...]:
            # Diffusers recomputes the blocks of a single stream without the mask.
            return (*inputs, mask) if len(inputs) == 3 else inputs

        with recomputing(self.denoiser, told):
            velocity = self.denoiser(
                hidden_states=tokens,
                timestep=timesteps / 1000,
                encoder_hidden_states=hidden,
                txt_ids=torch.zeros(hidden.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
                img_ids=places(noisy),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return unpacked(velocity, noisy.shape)
