"""Stable Diffusion 3 and 3.5: a transformer of a flow, with up to three text encoders."""

from __future__ import annotations

import torch
from torch import Tensor

from .family import Family


class StableDiffusion3(Family):
    """A pipeline with an SD3 transformer."""

    NAME = "Stable Diffusion 3 and 3.5"
    DENOISER = "SD3Transformer2DModel"
    TOKENS = ("tokenizer_3", 256)  # T5 reads more than CLIP's 77

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Hidden states (prompts, tokens, width) and pooled embeddings (prompts, projection)."""
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False
        )
        return {"hidden": hidden, "pooled": pooled}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of CLIP's 77 tokens and 256 of T5's."""
        config = self.denoiser.config
        return {
            "hidden": torch.empty(count, 77 + 256, config.joint_attention_dim, dtype=self.dtype),
            "pooled": torch.empty(count, config.pooled_projection_dim, dtype=self.dtype),
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the transformer says; it is not told of sizes."""
        prediction: Tensor = self.denoiser(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=text["hidden"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )[0]
        return prediction
