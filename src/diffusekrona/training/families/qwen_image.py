"""Qwen-Image: a flow whose transformer is given latents in patches of 2 x 2, and prompts of any length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedPipelineError
from .family import Family, packed, text_length, unpacked

TOKENS = 512
"""Of a prompt at most, as its pipeline takes it; the template around it is not counted."""


class QwenImage(Family):
    """A pipeline with a Qwen-Image transformer.

    Raises:
        UnsupportedPipelineError: its transformer is one for editing or for layers.
    """

    NAME = "Qwen-Image"
    DENOISER = "QwenImageTransformer2DModel"
    PATCH = 2
    VIDEO = True
    TOKENS = ("tokenizer", TOKENS)

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        found = [name for name in ("zero_cond_t", "use_additional_t_cond") if self.denoiser.config.get(name)]
        if found:
            raise UnsupportedPipelineError(
                f"The transformer of {type(pipe).__name__} has {found[0]}, which those for editing and for layered "
                "images have. Use the text-to-image model."
            )

    def taken(self, tokenizer: Any) -> int:
        """What is left of the template before the prompt when the pipeline has dropped it."""
        return text_length(tokenizer, self.pipe.prompt_template_encode.partition("{}")[0]) - int(
            self.pipe.prompt_template_encode_start_idx
        )

    @property
    def reduction(self) -> int:
        """Of the autoencoder and of patches; the transformer's `patch_size` speaks of the same patches."""
        return self.factor * self.PATCH

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Hidden states (prompts, tokens, width), and which tokens are the prompt's (prompts, tokens)."""
        hidden, mask = self.pipe.encode_prompt(prompt=prompts, device=device, max_sequence_length=TOKENS)
        if mask is None:  # as the pipeline says that all of them are
            mask = torch.ones(hidden.shape[:2], device=hidden.device)
        return {"hidden": hidden, "mask": mask.bool()}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of 512 tokens, none of them padding."""
        return {"hidden": torch.empty(count, TOKENS, self.denoiser.config.joint_attention_dim, dtype=self.dtype)}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the transformer says; it is not told of sizes."""
        count, _, height, width = noisy.shape
        mask = text.get("mask")
        velocity = self.denoiser(
            hidden_states=packed(noisy),
            timestep=timesteps / 1000,
            encoder_hidden_states=text["hidden"],
            # Attention without a mask is quicker.
            encoder_hidden_states_mask=None if mask is None or mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        return unpacked(velocity, noisy.shape)
