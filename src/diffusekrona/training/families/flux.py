"""FLUX.1: a flow whose transformer is given latents in patches of 2 x 2; dev is told how strong guidance shall be."""

from __future__ import annotations

import torch
from torch import Tensor

from .family import Family, packed, unpacked

T5_TOKENS = 512


class Flux(Family):
    """A pipeline with a FLUX.1 transformer: dev, schnell and what was made of them."""

    NAME = "FLUX.1"
    DENOISER = "FluxTransformer2DModel"
    PATCH = 2
    TOKENS = ("tokenizer_2", T5_TOKENS)

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """T5's hidden states (prompts, 512, width) and CLIP's pooled embeddings (prompts, projection)."""
        hidden, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, prompt_2=None, device=device, max_sequence_length=T5_TOKENS
        )
        return {"hidden": hidden, "pooled": pooled}

    def example(self, count: int) -> dict[str, Tensor]:
        """Of 512 tokens."""
        config = self.denoiser.config
        return {
            "hidden": torch.empty(count, T5_TOKENS, config.joint_attention_dim, dtype=self.dtype),
            "pooled": torch.empty(count, config.pooled_projection_dim, dtype=self.dtype),
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """What the transformer says; it is not told of sizes."""
        guided = self.denoiser.config.guidance_embeds
        velocity = self.denoiser(
            hidden_states=packed(noisy),
            timestep=timesteps / 1000,
            guidance=torch.full_like(timesteps, self.guidance, dtype=torch.float32) if guided else None,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["hidden"],
            txt_ids=torch.zeros(text["hidden"].shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=places(noisy),
            return_dict=False,
        )[0]
        return unpacked(velocity, noisy.shape)


def places(latents: Tensor) -> Tensor:
    """Each patch's place, (patches, 3): 0, its row and its column."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    found = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns))
    return found.to(latents.device, latents.dtype)
