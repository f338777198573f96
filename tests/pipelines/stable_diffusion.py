"""Tiny Stable Diffusion 1.x, SDXL and 3."""

from typing import Any

from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.pipelines.parts import (
    IMAGE_SIZE,
    TEXT_WIDTH,
    clip_config,
    clip_tokenizer,
    seeded,
    t5,
    t5_tokenizer,
    vae,
)


def tiny_sdxl_pipeline(seed: int = 0, **scheduler: Any) -> StableDiffusionXLPipeline:
    """A `StableDiffusionXLPipeline` with two text encoders; `scheduler` overrides its scheduler's entries."""
    return seeded(seed, lambda: _build_sdxl(scheduler))


def tiny_sd_pipeline(seed: int = 0, **scheduler: Any) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` without safety checker; `scheduler` overrides its scheduler's entries."""
    return seeded(seed, lambda: _build_sd(scheduler))


def tiny_sd3_pipeline(seed: int = 0, **scheduler: Any) -> StableDiffusion3Pipeline:
    """A `StableDiffusion3Pipeline` with all three text encoders; `scheduler` overrides its scheduler's entries."""
    return seeded(seed, lambda: _build_sd3(scheduler))


def _build_sdxl(scheduler: dict[str, Any]) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        **_unet_shape(),
        cross_attention_dim=2 * TEXT_WIDTH,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        # Six size and crop numbers, each embedded in 8 values, beside the pooled embedding of the prompt.
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet.eval(),
        scheduler=_scheduler(scheduler),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build_sd(scheduler: dict[str, Any]) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(**_unet_shape(), cross_attention_dim=TEXT_WIDTH).eval(),
        scheduler=_scheduler(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build_sd3(scheduler: dict[str, Any]) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=2 * TEXT_WIDTH,
        out_channels=4,
        pos_embed_max_size=32,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()).eval(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5().eval(),
        tokenizer_3=t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet_shape() -> dict[str, Any]:
    """Two levels, 64 and 128 wide, both with attention."""
    return {
        "sample_size": IMAGE_SIZE // 4,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "attention_head_dim": (4, 8),
        "norm_num_groups": 16,
    }


def _scheduler(overrides: dict[str, Any]) -> DDIMScheduler:
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**(settings | overrides))
