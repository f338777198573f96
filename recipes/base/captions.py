"""Captions of scenes, sometimes with a class word for the name, a made-up word, or without the background."""

from dataclasses import replace

import numpy as np

from .art import COLOURS, Concept
from .scenes import PLACES, Scene

CLASS_WORD_SHARE = 0.07
NO_BACKGROUND_SHARE = 0.05
MADE_UP_SHARE = 0.03  # a made-up word before the noun, so that unknown words are harmless by themselves
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789")


def training_caption(concept: Concept, scene: Scene, rng: np.random.Generator) -> str:
    """A caption to train on, with the class word or without the background in a small share of cases."""
    words = concept.kind if rng.random() < CLASS_WORD_SHARE else concept.name
    if rng.random() < MADE_UP_SHARE:
        words = "".join(rng.choice(LETTERS, int(rng.integers(2, 6)))) + " " + words
    return (replace(scene, colour=None) if rng.random() < NO_BACKGROUND_SHARE else scene).caption(words)


def vocabulary_text(chosen: list[Concept]) -> list[str]:
    """Every word a caption can hold, as phrases, for the tokenizer's training."""
    phrases = {c.name for c in chosen} | {c.kind for c in chosen} | set(COLOURS)
    return [*sorted(phrases), *PLACES, "a an on background small large at the twice three times"]
