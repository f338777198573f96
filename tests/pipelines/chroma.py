"""A tiny Chroma."""

from typing import Any

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.pipelines.parts import TEXT_WIDTH, seeded, t5, t5_tokenizer, vae


def tiny_chroma_pipeline(seed: int = 0, **scheduler: Any) -> ChromaPipeline:
    """A `ChromaPipeline`; `scheduler` overrides its scheduler's entries."""
    return seeded(seed, lambda: _build_chroma(scheduler))


def _build_chroma(scheduler: dict[str, Any]) -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        in_channels=4 * 4,  # latents in patches of 2 x 2
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=32,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    pipe = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae(shift_factor=0.1),
        text_encoder=t5().eval(),
        tokenizer=t5_tokenizer(),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
