"""A tiny PixArt."""

from typing import Any

from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests.pipelines.parts import TEXT_WIDTH, seeded, t5, t5_tokenizer, vae


def tiny_pixart_pipeline(seed: int = 0, kind: Any = PixArtSigmaPipeline, sample_size: int = 32) -> Any:
    """A `PixArtSigmaPipeline`, or one of another kind, that draws images of any size.

    Args:
        seed: of the weights.
        kind: the pipeline's class.
        sample_size: of the transformer; one of 128 is told of the images' sizes.
    """
    return seeded(seed, lambda: _build_pixart(kind, sample_size))


def _build_pixart(kind: Any, sample_size: int) -> Any:
    transformer = PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=24 if sample_size == 128 else 16,  # sizes are told in three parts of equal width
        num_layers=1,
        norm_num_groups=8,
        cross_attention_dim=96 if sample_size == 128 else 64,
        caption_channels=2 * TEXT_WIDTH,
        sample_size=sample_size,
    )
    pipe = kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5().eval(),
        vae=vae(scaling_factor=0.13),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    # Its own sizes begin at 256 pixels.
    pipe.image_processor.classify_height_width_bin = lambda height, width, ratios: (height, width)
    return pipe
