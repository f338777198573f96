"""A tiny FLUX.1."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel

from tests.pipelines.parts import TEXT_WIDTH, clip_config, clip_tokenizer, seeded, t5, t5_tokenizer, vae


def tiny_flux_pipeline(seed: int = 0, guided: bool = False, **scheduler: Any) -> FluxPipeline:
    """A `FluxPipeline` with both text encoders; `scheduler` overrides its scheduler's entries.

    Its transformer is told of guidance, as dev's, or not, as schnell's.
    """
    return seeded(seed, lambda: _build_flux(guided, scheduler))


def _build_flux(guided: bool, scheduler: dict[str, Any]) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=4 * 4,  # latents in patches of 2 x 2
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guided,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5().eval(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def packed(pipe: Any, latents: Tensor) -> Tensor:
    """Latents as FLUX.1's pipeline packs them."""
    tokens: Tensor = pipe._pack_latents(latents, *latents.shape)
    return tokens
