"""Z-Image: a flow whose transformer takes images and prompts one by one, and is told how far from noise they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...errors import UnsupportedPipelineError
from .family import Family, template_length

TOKENS = 512
"""Of a prompt at most, as its pipeline takes it."""
PATCH = 2
"""Elements of a side of the latents that the transformer makes one token of."""


class ZImage(Family):
    """A pipeline with a Z-Image transformer: Z-Image, its Turbo and what was made of them.

    Raises:
        UnsupportedPipelineError: its transformer is one for editing.
    """

    NAME = "Z-Image"
    DENOISER = "ZImageTransformer2DModel"
    TOKENS = ("tokenizer", TOKENS)

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if self.denoiser.config.get("siglip_feat_dim"):
            raise UnsupportedPipelineError(
                f"The transformer of {type(pipe).__name__} has siglip_feat_dim, which those for editing have. "
                "Use the text-to-image model."
            )

    def taken(self, tokenizer: Any) -> int:
        """Of Qwen's template."""
        return template_length(tokenizer, str, add_generation_prompt=True, enable_thinking=True)

    @property
    def reduction(self) -> int:
        """Of the autoencoder and of patches."""
        return self.factor * PATCH

    @property
    def resolution(self) -> int:
        """That the pipeline draws by default."""
        return 1024

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Hidden states (prompts, tokens, width), and which tokens are the prompt's (prompts, tokens)."""
        # The pipeline writes into the list that it is given.
        rows, _ = self.pipe.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        masks = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        return {"hidden": pad_sequence(rows, batch_first=True), "mask": pad_sequence(masks, batch_first=True)}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of 512 tokens, none of them padding."""
        return {"hidden": torch.empty(count, TOKENS, self.denoiser.config.cap_feat_dim, dtype=self.dtype)}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the transformer says, which is latents − noise, turned round; it is not told of sizes."""
        prompts = list(text["hidden"])
        if "mask" in text:
            prompts = [row[:length] for row, length in zip(prompts, text["mask"].sum(1).tolist(), strict=True)]
        images = self.denoiser(list(noisy.unsqueeze(2)), (1000 - timesteps) / 1000, prompts, return_dict=False)[0]
        return -torch.stack(images).squeeze(2)
