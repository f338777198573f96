"""A tiny Krea 2."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.pipelines.parts import TEXT_WIDTH, seeded
from tests.pipelines.qwen_image import VISION, answering_tokenizer, frame_vae, text_config


def tiny_krea2_pipeline(seed: int = 0, distilled: bool = False, **scheduler: Any) -> Krea2Pipeline:
    """A `Krea2Pipeline`, whose text encoder tells of two layers; `scheduler` overrides its scheduler's entries."""
    return seeded(seed, lambda: _build_krea2(distilled, scheduler))


def _build_krea2(distilled: bool, scheduler: dict[str, Any]) -> Krea2Pipeline:
    transformer = Krea2Transformer2DModel(
        in_channels=4 * 4,  # latents in patches of 2 x 2
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=TEXT_WIDTH,
        num_text_layers=2,
        text_num_attention_heads=4,
        text_num_key_value_heads=4,
        text_intermediate_size=64,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    text = Qwen3VLConfig(
        text_config=text_config(layers=2),
        vision_config={**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )
    pipe = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            **({"use_dynamic_shifting": True, "max_image_seq_len": 6400} | scheduler)
        ),
        vae=frame_vae(),
        text_encoder=Qwen3VLModel(text).eval(),
        tokenizer=answering_tokenizer(),
        transformer=transformer.eval(),
        text_encoder_select_layers=(1, 2),
        is_distilled=distilled,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
