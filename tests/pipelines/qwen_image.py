"""A tiny Qwen-Image, and the parts of it that Krea 2 has, too."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests.pipelines.parts import TEXT_WIDTH, seeded
from tests.pipelines.qwen import sizes, tokenizer

VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
"""A text encoder's model of images, which prompts do not reach."""


def tiny_qwen_image_pipeline(seed: int = 0, **scheduler: Any) -> QwenImagePipeline:
    """A `QwenImagePipeline`; `scheduler` overrides its scheduler's entries."""
    return seeded(seed, lambda: _build_qwen_image(scheduler))


def _build_qwen_image(scheduler: dict[str, Any]) -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * 4,  # latents in patches of 2 x 2
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    text = Qwen2_5_VLConfig(text_config=text_config(layers=1), vision_config=VISION)
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            **({"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192} | scheduler)
        ),
        vae=frame_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(text).eval(),
        tokenizer=answering_tokenizer(),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frame_vae() -> AutoencoderKLQwenImage:
    """Of videos; latents of a frame are a quarter of it on each side."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 1.0, 2.0],
    ).eval()


def answering_tokenizer() -> Qwen2Tokenizer:
    """The start of an answer takes as many tokens as with the real one."""
    found = tokenizer()
    found.add_tokens(["assistant"])
    return found


def text_config(layers: int) -> dict[str, Any]:
    """Of a language model for that tokenizer, whose heads are 32 wide."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return {**sizes(layers, TEXT_WIDTH), "vocab_size": len(answering_tokenizer()), "rope_parameters": rotary}


@torch.no_grad()
def decoded_frame(pipe: Any, pixels: Tensor) -> Tensor:
    """Images (1, 3, height, width) in [-1, 1] after the way there and back as a single frame, in [0, 1]."""
    there = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
    return (pipe.vae.decode(there).sample[:, :, 0] / 2 + 0.5).clamp(0, 1)
