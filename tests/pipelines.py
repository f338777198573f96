"""Tiny pipelines with random weights, for tests that need a whole Stable Diffusion without a download.

All work on 32 x 32 images (latents 4 x 8 x 8) and are built in a fraction of a second. The weights come from
a seed, so two calls give equal pipelines. Every attention projection is 64 or 128 wide on either side, so the
default factors (a1, a2) = (4, 64) fit all of them, in the UNet or transformer and in the text encoders.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

IMAGE_SIZE = 32
TEXT_WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789[]()<>|,.:;!?'-_+=*&%$#@~^"

Built = TypeVar("Built")


def tiny_sdxl_pipeline(seed: int = 0, **scheduler: Any) -> StableDiffusionXLPipeline:
    """A `StableDiffusionXLPipeline` with two text encoders; `scheduler` overrides its scheduler's entries."""
    return _seeded(seed, lambda: _build_sdxl(scheduler))


def tiny_sd_pipeline(seed: int = 0, **scheduler: Any) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` without safety checker; `scheduler` overrides its scheduler's entries."""
    return _seeded(seed, lambda: _build_sd(scheduler))


def tiny_sd3_pipeline(seed: int = 0, **scheduler: Any) -> StableDiffusion3Pipeline:
    """A `StableDiffusion3Pipeline` with all three text encoders; `scheduler` overrides its scheduler's entries."""
    return _seeded(seed, lambda: _build_sd3(scheduler))


def tiny_flux_pipeline(seed: int = 0, **scheduler: Any) -> FluxPipeline:
    """A `FluxPipeline` with both text encoders, without guidance; `scheduler` overrides its scheduler's entries."""
    return _seeded(seed, lambda: _build_flux(scheduler))


def _seeded(seed: int, build: Callable[[], Built]) -> Built:
    """Run `build` with its own random state, leaving the caller's untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


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
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config()).eval(),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet.eval(),
        scheduler=_scheduler(scheduler),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build_sd(scheduler: dict[str, Any]) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        tokenizer=_tokenizer(),
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
        vae=_vae(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(_text_config()).eval(),
        tokenizer=_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config()).eval(),
        tokenizer_2=_tokenizer(),
        text_encoder_3=_t5().eval(),
        tokenizer_3=T5Tokenizer(vocab=_t5_vocabulary(), extra_ids=0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build_flux(scheduler: dict[str, Any]) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=4 * 4,  # latents in patches of 2 x 2
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=_vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        tokenizer=_tokenizer(),
        text_encoder_2=_t5().eval(),
        tokenizer_2=T5Tokenizer(vocab=_t5_vocabulary(), extra_ids=0),
        transformer=transformer.eval(),
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


def _vae(**more: Any) -> AutoencoderKL:
    """Three levels, so latents are a quarter of the image on each side; no attention, to stay quick."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
        **more,
    ).eval()


def _vocabulary() -> dict[str, int]:
    """Single characters, inside a word and at its end, then the two special tokens."""
    letters = list(ALPHABET) + [letter + "</w>" for letter in ALPHABET]
    return {token: index for index, token in enumerate([*letters, START, END])}


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=77)


def _text_config() -> CLIPTextConfig:
    vocabulary = _vocabulary()
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )


def _t5_vocabulary() -> list[tuple[str, float]]:
    """Pieces with their scores: the special tokens, the sign that starts a word, and single characters."""
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in ALPHABET)]


def _t5() -> T5EncoderModel:
    width = 2 * TEXT_WIDTH  # as wide as both other encoders together
    return T5EncoderModel(
        T5Config(vocab_size=len(_t5_vocabulary()), d_model=width, d_kv=32, d_ff=width, num_layers=1, num_heads=4)
    )


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
