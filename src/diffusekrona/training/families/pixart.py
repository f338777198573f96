"""PixArt-α and PixArt-Σ: a diffusion whose transformer also says how sure it is, which training leaves as it is."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .family import Family


class PixArt(Family):
    """A pipeline with a PixArt transformer."""

    NAME = "PixArt-α and PixArt-Σ"
    DENOISER = "PixArtTransformer2DModel"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        # Of each prompt, padded: 120 of α, 300 of Σ.
        self._tokens = int(signature(pipe.encode_prompt).parameters["max_sequence_length"].default)
        self.TOKENS = ("tokenizer", self._tokens)  # type: ignore[misc]

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """T5's hidden states (prompts, tokens, width), and which tokens are no padding (prompts, tokens).

        Prompts are cleaned as the pipeline cleans them.
        """
        cleaned = signature(self.pipe.__call__).parameters["clean_caption"].default
        hidden, mask, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device, clean_caption=cleaned
        )
        return {"hidden": hidden, "mask": mask.long()}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of 120 or 300 tokens."""
        return {
            "hidden": torch.empty(count, self._tokens, self.denoiser.config.caption_channels, dtype=self.dtype),
            "mask": torch.ones(count, self._tokens, dtype=torch.long),
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the transformer says of the noise; α of 1024 pixels is told of the image's size."""
        count, channels, height, width = noisy.shape
        size = torch.tensor([[height * self.factor, width * self.factor]] * count).to(noisy)
        told = self.denoiser.use_additional_conditions
        prediction: Tensor = self.denoiser(
            noisy,
            encoder_hidden_states=text["hidden"],
            encoder_attention_mask=text["mask"],
            timestep=timesteps,
            added_cond_kwargs={
                "resolution": size if told else None,
                "aspect_ratio": size[:, :1] / size[:, 1:] if told else None,
            },
            return_dict=False,
        )[0]
        return prediction[:, :channels]  # its variance follows, where it says one
