"""Krea 2: a flow on patches of 2 x 2, told of prompts by several of its text encoder's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family, packed, scheduled_shift, text_length, unpacked

TOKENS = 512
"""Of each prompt, padded and with what follows it in the template."""
END = 5
"""Of them, what follows."""
DISTILLED_SHIFT = 1.15
"""Logarithm of the shift with which distilled models draw images of every size."""


class Krea2(Family):
    """A pipeline with a Krea 2 transformer, Raw or Turbo."""

    NAME = "Krea 2"
    DENOISER = "Krea2Transformer2DModel"
    PATCH = 2
    VIDEO = True
    TOKENS = ("tokenizer", TOKENS - END)

    def taken(self, tokenizer: Any) -> int:
        """What is left of the template before the prompt when the pipeline has dropped it."""
        return text_length(tokenizer, self.pipe.prompt_template_encode_prefix) - int(
            self.pipe.prompt_template_encode_start_idx
        )

    @property
    def resolution(self) -> int:
        """1024, which its pipeline draws by default."""
        return 1024

    def shift(self, tokens: int) -> float:
        """By the number of tokens, unless the model is distilled."""
        config = self.pipe.scheduler.config
        if self.pipe.config.is_distilled:
            config = {**config, "base_shift": DISTILLED_SHIFT, "max_shift": DISTILLED_SHIFT}
        return scheduled_shift(config, tokens)

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Hidden states (prompts, 512, layers, width), and which tokens are no padding (prompts, 512).

        Padding is in the middle: the template's end comes after it.
        """
        hidden, mask = self.pipe.encode_prompt(prompt=prompts, device=device, max_sequence_length=TOKENS)
        return {"hidden": hidden, "mask": mask}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of 512 tokens."""
        config = self.denoiser.config
        return {
            "hidden": torch.empty(count, TOKENS, config.num_text_layers, config.text_hidden_dim, dtype=self.dtype),
            "mask": torch.ones(count, TOKENS, dtype=torch.bool),
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the transformer says; it is not told of sizes."""
        rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        tokens = text["hidden"].shape[1]
        velocity = self.denoiser(
            hidden_states=packed(noisy),
            encoder_hidden_states=text["hidden"],
            timestep=timesteps / 1000,
            position_ids=self.pipe.prepare_position_ids(tokens, rows, columns, noisy.device),
            encoder_attention_mask=text["mask"],
            return_dict=False,
        )[0]
        return unpacked(velocity, noisy.shape)
