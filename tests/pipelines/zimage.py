"""A tiny Z-Image."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.pipelines.parts import TEXT_WIDTH, seeded, vae
from tests.pipelines.qwen import qwen3, tokenizer


def tiny_zimage_pipeline(seed: int = 0, **scheduler: Any) -> ZImagePipeline:
    """A `ZImagePipeline`; `scheduler` overrides its scheduler's entries."""
    return seeded(seed, lambda: _build_zimage(scheduler))


def _build_zimage(scheduler: dict[str, Any]) -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.normal_()
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae(shift_factor=0.1),
        text_encoder=qwen3(2, TEXT_WIDTH),
        tokenizer=tokenizer(),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
