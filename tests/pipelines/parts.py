"""What tiny pipelines are made of: an autoencoder, text encoders and tokenizers with random weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

IMAGE_SIZE = 32
TEXT_WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789[]()<>|,.:;!?'-_+=*&%$#@~^"

Built = TypeVar("Built")


def _as_they_are(pipe: Any, latents: Tensor) -> Tensor:
    return latents


@torch.no_grad()
def decoded(pipe: Any, pixels: Tensor) -> Tensor:
    """Images (1, 3, height, width) in [-1, 1] after the autoencoder's way there and back, in [0, 1]."""
    there = pipe.vae.encode(pixels).latent_dist.mode()
    return (pipe.vae.decode(there).sample / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Tiny:
    """How a family's tiny pipeline is made, and which forms its latents have in it.

    Attributes:
        build: makes the pipeline.
        given: of (pipe, latents), the latents as its argument `latents` wants them; those of the trainer are
            (batch, channels, height, width).
        stepped: the same, as its scheduler steps on them.
        decoded: of (pipe, pixels), images as its autoencoder encodes and decodes them.
        program: one that reads its adapters, as `save_krona` calls it.
        options: of calls of the pipeline in which the denoiser is asked once for a step, beside `guidance_scale` 1.
    """

    build: Callable[..., Any]
    given: Callable[[Any, Tensor], Tensor] = _as_they_are
    stepped: Callable[[Any, Tensor], Tensor] = _as_they_are
    decoded: Callable[[Any, Tensor], Tensor] = decoded
    program: str = "comfyui"
    options: Mapping[str, Any] = field(default_factory=dict)


def seeded(seed: int, build: Callable[[], Built]) -> Built:
    """Run `build` with its own random state, leaving the caller's untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def vae(**more: Any) -> AutoencoderKL:
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


def clip_vocabulary() -> dict[str, int]:
    """Single characters, inside a word and at its end, then the two special tokens."""
    letters = list(ALPHABET) + [letter + "</w>" for letter in ALPHABET]
    return {token: index for index, token in enumerate([*letters, START, END])}


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=clip_vocabulary(), merges=[], model_max_length=77)


def clip_config() -> CLIPTextConfig:
    vocabulary = clip_vocabulary()
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


def t5_vocabulary() -> list[tuple[str, float]]:
    """Pieces with their scores: the special tokens, the sign that starts a word, and single characters."""
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in ALPHABET)]


def t5() -> T5EncoderModel:
    width = 2 * TEXT_WIDTH  # as wide as both other encoders together
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_vocabulary()), d_model=width, d_kv=32, d_ff=width, num_layers=1, num_heads=4)
    )


def t5_tokenizer() -> T5Tokenizer:
    """Of single characters."""
    return T5Tokenizer(vocab=t5_vocabulary(), extra_ids=0)
