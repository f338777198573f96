"""What the encoders are trained on: emoji in three styles with their names, the studies' subjects left out."""

import json
from dataclasses import dataclass

import numpy as np

from recipes.base.art import STYLES, art_path, concepts, fetch
from recipes.base.subjects import SUBJECTS

ALL_STYLES = (*STYLES, "fluent")
CATEGORIES = (
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Activities",
    "Travel & Places",
    "Smileys & Emotion",
)
HELD_OUT = 120
"""Emoji whose Fluent drawing is kept from training, to be recognised by what the other styles taught."""


@dataclass(frozen=True)
class Thing:
    """One emoji: its files' stem, its name, and its class word where the base's concepts have one."""

    image: str
    name: str
    kind: str | None


def things() -> list[Thing]:
    """All emoji of these categories that every style draws, but for the subjects; concepts have the base's names."""
    known = {concept.image: concept for concept in concepts()}
    subjects = {subject.image for subject in SUBJECTS}
    text = (fetch() / "emoji-datasource-google" / "emoji.json").read_text(encoding="utf-8")
    found = []
    for entry in sorted(json.loads(text), key=lambda entry: str(entry["image"])):
        image = str(entry["image"]).removesuffix(".png")
        if entry["category"] not in CATEGORIES or image in subjects:
            continue
        if all(art_path(style, image).is_file() for style in ALL_STYLES):
            concept = known.get(image)
            spoken = str(entry["short_name"]).replace("_", " ").replace("-", " ").lower()
            found.append(Thing(image, concept.name if concept else spoken, concept.kind if concept else None))
    return found


def held_out(of: list[Thing]) -> set[int]:
    """Numbers of the things whose Fluent drawing is not trained on; half of them are concepts of the base."""
    rng = np.random.default_rng(5)
    named = [number for number, thing in enumerate(of) if thing.kind]
    others = [number for number, thing in enumerate(of) if not thing.kind]
    return {int(n) for part in (named, others) for n in rng.choice(part, HELD_OUT // 2, replace=False)}
