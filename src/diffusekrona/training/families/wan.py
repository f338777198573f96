"""Wan 2.1 and 2.2: a flow of videos, trained on images as videos of a single frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedPipelineError
from .family import Family

TOKENS = 512
"""Of each prompt, padded with zeros."""


class Wan(Family):
    """A pipeline with one Wan transformer.

    Raises:
        UnsupportedPipelineError: it has two.
    """

    NAME = "Wan 2.1 and 2.2"
    DENOISER = "WanTransformer3DModel"
    VIDEO = True
    TOKENS = ("tokenizer", TOKENS)

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if getattr(pipe, "transformer_2", None) is not None or pipe.config.boundary_ratio is not None:
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} has two transformers, one for more and one for less noise, and only one can be "
                "trained. Use Wan 2.1, or Wan 2.2 with 5 billion parameters."
            )

    @property
    def factor(self) -> int:
        """That of a frame's sides."""
        return int(self.pipe.vae_scale_factor_spatial)

    @property
    def reduction(self) -> int:
        """Of the autoencoder and of patches."""
        return self.factor * int(self.denoiser.config.patch_size[-1])

    @property
    def resolution(self) -> int:
        """480, the shorter side that its pipeline draws by default."""
        return 480

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Hidden states (prompts, 512, width), 0 where there is no token any more."""
        hidden, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device, max_sequence_length=TOKENS
        )
        return {"hidden": hidden}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of 512 tokens."""
        return {"hidden": torch.empty(count, TOKENS, self.denoiser.config.text_dim, dtype=self.dtype)}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the transformer says; it is not told of sizes."""
        if self.pipe.config.expand_timesteps:  # some are told the noise of each token
            patch = self.denoiser.config.patch_size
            tokens = (noisy.shape[-2] // patch[-2]) * (noisy.shape[-1] // patch[-1])
            timesteps = timesteps[:, None].expand(-1, tokens)
        velocity: Tensor = self.denoiser(
            hidden_states=noisy.unsqueeze(2),
            timestep=timesteps,
            encoder_hidden_states=text["hidden"],
            return_dict=False,
        )[0]
        return velocity.squeeze(2)
