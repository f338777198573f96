"""Captions of scenes: style and name, sometimes a wider class, a made-up word, or no background."""

from dataclasses import replace

import numpy as np

from . import art
from .art import Concept
from .pictures import COLOURS
from .scenes import PLACES, Scene

KIND_SHARE = 0.05  # "animal" in place of "fox"
NO_STYLE_SHARE = 0.1  # two styles under one caption mix, so this is small
MADE_UP_SHARE = 0.05  # a made-up word in place of the style, as a subject's name will be
NO_BACKGROUND_SHARE = 0.05
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789")


def training_caption(concept: Concept, style: str, scene: Scene, rng: np.random.Generator) -> str:
    """A caption to train on."""
    words = concept.kind if rng.random() < KIND_SHARE else concept.name
    chance = rng.random()
    if chance < MADE_UP_SHARE:
        words = "".join(rng.choice(LETTERS, int(rng.integers(2, 6)))) + " " + words
    elif chance >= MADE_UP_SHARE + NO_STYLE_SHARE:
        words = f"{style} {words}"
    return (replace(scene, colour=None) if rng.random() < NO_BACKGROUND_SHARE else scene).caption(words)


def vocabulary_text() -> list[str]:
    """Every word a caption can hold, as phrases, for the tokenizer's training."""
    phrases = {concept.name for concept in art.concepts()} | {concept.kind for concept in art.concepts()}
    phrases |= {subject.word for subject in art.subjects()} | set(COLOURS) | set(art.STYLES.values())
    return [*sorted(phrases), *PLACES, "a an on background small large at the twice three times"]
