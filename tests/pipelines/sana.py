"""A tiny SANA."""

from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests.pipelines.parts import ALPHABET, TEXT_WIDTH, seeded

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def tiny_sana_pipeline(seed: int = 0, **scheduler: Any) -> SanaPipeline:
    """A `SanaPipeline` that draws images of any size; `scheduler` overrides its scheduler's entries."""
    return seeded(seed, lambda: _build_sana(scheduler))


def _build_sana(scheduler: dict[str, Any]) -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=TEXT_WIDTH,
        sample_size=16,
    )
    pipe = SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma().eval(),
        vae=_vae(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(
            **({"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"} | scheduler)
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    # Its own sizes begin at 512 pixels.
    pipe.image_processor.classify_height_width_bin = lambda height, width, ratios: (height, width)
    return pipe


def _vae() -> AutoencoderDC:
    """Latents are a quarter of the image on each side."""
    sides: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": "ResBlock",
            "block_out_channels": (8, 16, 16),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), ()),
        }.items()
    }
    return AutoencoderDC(latent_channels=4, scaling_factor=0.4, **sides).eval()


def gemma() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(SPECIAL) + 1 + len(ALPHABET),
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            query_pre_attn_scalar=32,
        )
    )


def gemma_tokenizer() -> GemmaTokenizer:
    """Of single characters."""
    return GemmaTokenizer(vocab={token: number for number, token in enumerate([*SPECIAL, "▁", *ALPHABET])}, merges=[])


@torch.no_grad()
def decoded_latent(pipe: Any, pixels: Tensor) -> Tensor:
    """Images (1, 3, height, width) in [-1, 1] after the autoencoder's way there and back, in [0, 1]."""
    return (pipe.vae.decode(pipe.vae.encode(pixels).latent).sample / 2 + 0.5).clamp(0, 1)
