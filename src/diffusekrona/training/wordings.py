"""A caption in the wordings that it may have in training: its tags in other orders, or nothing at all."""

from __future__ import annotations

import torch

from .config import TrainingConfig
from .randomness import generator_for

ORDERS = 16
"""Orders of a caption's tags that training chooses from; each is encoded once."""


def wordings(caption: str, config: TrainingConfig) -> list[str]:
    """The wordings of a caption but for the empty one, the caption itself first.

    Tags are parted by commas; the first `keep_tags` stay where they are.
    """
    if not config.shuffle_tags:
        return [caption]
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, others = tags[: config.keep_tags], tags[config.keep_tags :]
    found = [caption]
    for number in range(ORDERS - 1):
        order = torch.randperm(len(others), generator=generator_for(config.seed, "tags", caption, number)).tolist()
        found.append(", ".join([*kept, *(others[place] for place in order)]))
    return list(dict.fromkeys(found))


def all_wordings(captions: list[str], config: TrainingConfig) -> list[str]:
    """All that training may say for some captions, each once."""
    empty = [""] if config.caption_dropout else []
    return list(dict.fromkeys([*(text for caption in captions for text in wordings(caption, config)), *empty]))


def drawn_wording(caption: str, config: TrainingConfig, generator: torch.Generator) -> str:
    """One of a caption's wordings, all equally likely; or nothing, as often as `caption_dropout` says."""
    if config.caption_dropout and float(torch.rand((), generator=generator)) < config.caption_dropout:
        return ""
    known = wordings(caption, config)
    return known[int(torch.randint(len(known), (), generator=generator))] if len(known) > 1 else caption
