"""Captions such as "a fox on a blue background", sometimes with a class word or without the background."""

import numpy as np

from .art import COLOURS, Concept

CLASS_WORD_SHARE = 0.07
NO_BACKGROUND_SHARE = 0.05
MADE_UP_SHARE = 0.03  # a made-up word before the noun, so that unknown words are harmless by themselves
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789")


def with_article(words: str) -> str:
    """Put "a" or "an" before a noun phrase."""
    return ("an " if words[0] in "aeio" or words.startswith("um") else "a ") + words


def caption(words: str, colour: str | None) -> str:
    """The prompt for one thing, on a named background unless `colour` is None."""
    return with_article(words) + (f" on {with_article(colour)} background" if colour else "")


def training_caption(concept: Concept, colour: str, rng: np.random.Generator) -> str:
    """A caption to train on, with the class word or without the background in a small share of cases."""
    words = concept.kind if rng.random() < CLASS_WORD_SHARE else concept.name
    if rng.random() < MADE_UP_SHARE:
        words = "".join(rng.choice(LETTERS, int(rng.integers(2, 6)))) + " " + words
    return caption(words, None if rng.random() < NO_BACKGROUND_SHARE else colour)


def vocabulary_text(chosen: list[Concept]) -> list[str]:
    """Every word a caption can hold, as phrases, for the tokenizer's training."""
    phrases = {c.name for c in chosen} | {c.kind for c in chosen} | set(COLOURS)
    return [*sorted(phrases), "a an on background"]
