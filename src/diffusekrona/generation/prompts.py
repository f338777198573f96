"""Prompts longer than CLIP's 77 tokens, for Stable Diffusion 1.x, 2.x and SDXL: encoded in chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """Encoded prompts.

    Attributes:
        hidden: hidden states (prompts, 77 · chunks, width).
        pooled: SDXL's pooled embeddings of the first chunk (prompts, projection); None for others.
    """

    hidden: Tensor
    pooled: Tensor | None


def chunks_needed(pipe: Any, prompts: list[str]) -> int:
    """How many chunks the longest of some prompts takes in any of a pipeline's CLIP tokenizers, at least 1."""
    return max(
        -(-len(_tokens(tokenizer, pipe, prompt)) // _room(tokenizer)) or 1
        for tokenizer in _tokenizers(pipe)
        for prompt in prompts
    )


def encode_in_chunks(pipe: Any, prompts: list[str], chunks: int, device: torch.device) -> Encoded:
    """Encode prompts, each in so many chunks; what they do not fill is encoded as an empty prompt.

    A chunk starts and ends like a prompt of its own, so that one chunk is what the pipeline itself makes of a prompt
    that fits. The encoders have a row for each prompt, as `krona_batch` wants it.
    """
    is_sdxl = getattr(pipe, "text_encoder_2", None) is not None
    parts: list[Tensor] = []
    pooled = None
    for tokenizer, encoder in zip(_tokenizers(pipe), _encoders(pipe), strict=True):
        ids = torch.tensor([_chunked(tokenizer, pipe, prompt, chunks) for prompt in prompts]).to(device)
        masked = getattr(encoder.config, "use_attention_mask", False)
        said = [
            encoder(
                rows,
                attention_mask=(rows != tokenizer.pad_token_id).long() if masked else None,
                output_hidden_states=is_sdxl,
            )
            for rows in ids.unbind(1)
        ]
        parts.append(torch.cat([one.hidden_states[-2] if is_sdxl else one[0] for one in said], dim=1))
        if is_sdxl:
            pooled = said[0][0]  # of the last encoder, which projects it
    return Encoded(torch.cat(parts, dim=-1), pooled)


def _tokenizers(pipe: Any) -> list[Any]:
    return [one for name in ("tokenizer", "tokenizer_2") if (one := getattr(pipe, name, None)) is not None]


def _encoders(pipe: Any) -> list[Any]:
    return [one for name in ("text_encoder", "text_encoder_2") if (one := getattr(pipe, name, None)) is not None]


def _room(tokenizer: Any) -> int:
    """Tokens between a chunk's start and its end."""
    return int(tokenizer.model_max_length) - 2


def _tokens(tokenizer: Any, pipe: Any, prompt: str) -> list[int]:
    """A prompt's tokens, without those that mark its start and end; names of textual inversions become theirs."""
    text = pipe.maybe_convert_prompt(prompt, tokenizer) if hasattr(pipe, "maybe_convert_prompt") else prompt
    found: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return found


def _chunked(tokenizer: Any, pipe: Any, prompt: str, chunks: int) -> list[list[int]]:
    """A prompt's tokens in chunks, each with its start and end, and padded as the tokenizer pads."""
    tokens, room = _tokens(tokenizer, pipe, prompt), _room(tokenizer)
    found = []
    for number in range(chunks):
        inside = tokens[number * room : (number + 1) * room]
        chunk = [tokenizer.bos_token_id, *inside, tokenizer.eos_token_id]
        found.append(chunk + [tokenizer.pad_token_id] * (room + 2 - len(chunk)))
    return found
