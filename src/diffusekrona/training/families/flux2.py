"""FLUX.2 and FLUX.2 klein: a flow on patches of 2 x 2 latents that are normalised as one, channel by channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, template_length

TEXT_TOKENS = 512
STEPS = 50
"""That pictures are drawn with: FLUX.2 shifts noise levels by their number, too."""


class Flux2(Family):
    """A pipeline with a FLUX.2 transformer: dev, klein, and klein's bases.

    Latents are patches as the transformer takes them, of 4 times the autoencoder's channels and half its sides.
    """

    NAME = "FLUX.2"
    DENOISER = "Flux2Transformer2DModel"
    PATCH = 2
    TOKENS = ("tokenizer", TEXT_TOKENS)

    def taken(self, tokenizer: Any) -> int:
        """Of the template: klein's is Qwen's, and dev's has the system's message first."""
        system = getattr(self.pipe, "system_message", None)
        if system is None:
            return template_length(tokenizer, str, add_generation_prompt=True, enable_thinking=False)
        return template_length(tokenizer, _content, {"role": "system", "content": _content(system)})

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Of patches."""
        channels, rows, columns = super().latent_shape(height, width)
        return channels * 4, rows // 2, columns // 2

    def shift(self, tokens: int) -> float:
        """By `mu` where the scheduler's configuration leaves it to the image's size."""
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return super().shift(tokens)
        return mu(tokens) if config.get("time_shift_type") == "linear" else math.exp(mu(tokens))

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Hidden states of three layers of the language model, beside each other: (prompts, 512, 3 · width).

        Padding is part of them: the transformer is given no mask.
        """
        hidden, _ = self.pipe.encode_prompt(prompt=prompts, device=device, max_sequence_length=TEXT_TOKENS)
        return {"hidden": hidden}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of 512 tokens."""
        return {"hidden": torch.empty(count, TEXT_TOKENS, self.denoiser.config.joint_attention_dim, dtype=self.dtype)}

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Of patches: less the mean, over the standard deviation, that the autoencoder's batch norm has of each."""
        vae = self.pipe.vae
        found = vae.encode(pixels).latent_dist
        patches, spread = (nn.functional.pixel_unshuffle(part, 2) for part in (found.mean, found.std))
        mean, variance = (part.view(1, -1, 1, 1).to(patches) for part in (vae.bn.running_mean, vae.bn.running_var))
        std = (variance + vae.config.batch_norm_eps).sqrt()
        return (patches - mean) / std, spread / std

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the transformer says; it is not told of sizes."""
        guided = self.denoiser.config.guidance_embeds
        rows, columns = noisy.shape[-2:]
        velocity = self.denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=timesteps / 1000,
            guidance=torch.full_like(timesteps, self.guidance, dtype=torch.float32) if guided else None,
            encoder_hidden_states=text["hidden"],
            txt_ids=_places(noisy.device, last=text["hidden"].shape[1]),
            img_ids=_places(noisy.device, rows=rows, columns=columns),
            return_dict=False,
        )[0]
        found: Tensor = velocity.transpose(1, 2).unflatten(2, (rows, columns))
        return found


def mu(tokens: int, steps: int = STEPS) -> float:
    """The logarithm of the shift of an image of so many tokens, drawn in so many steps, as Black Forest Labs found it.

    It grows linearly with the tokens, in one way for 10 steps and in another for 200, linearly between them with the
    steps, and from 4300 tokens on as for 200 steps.
    """
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return many if tokens > 4300 else few + (many - few) * (steps - 10) / 190


def _content(text: str) -> list[dict[str, str]]:
    """A text as a message's content."""
    return [{"type": "text", "text": text}]


def _places(device: Any, rows: int = 1, columns: int = 1, last: int = 1) -> Tensor:
    """Each token's place, (tokens, 4): 0, its row and column in the image, its place in the text."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, rows, columns, last)))
