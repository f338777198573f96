"""A tiny Wan."""

from typing import Any

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from tests.pipelines.parts import TEXT_WIDTH, seeded, t5_tokenizer, t5_vocabulary
from tests.pipelines.qwen_image import decoded_frame


def tiny_wan_pipeline(seed: int = 0, **options: Any) -> WanPipeline:
    """A `WanPipeline` with one transformer; `options` are the pipeline's."""
    return seeded(seed, lambda: _build_wan(options))


def _build_wan(options: dict[str, Any]) -> WanPipeline:
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=1,
        rope_max_seq_len=128,
    )
    text = UMT5Config(
        vocab_size=len(t5_vocabulary()), d_model=TEXT_WIDTH, d_kv=16, d_ff=TEXT_WIDTH, num_layers=1, num_heads=4
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 1.0, 2.0],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    pipe = WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer.eval(),
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_video(pipe: Any, latents: Tensor) -> Tensor:
    """Latents as those of videos of a single frame."""
    return latents.unsqueeze(2)


def decoded_video(pipe: Any, pixels: Tensor) -> Tensor:
    """What `decoded_frame` gives, as videos (1, 1, 3, height, width)."""
    return decoded_frame(pipe, pixels).unsqueeze(1)
