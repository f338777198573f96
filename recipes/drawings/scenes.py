"""Scenes: a thing's number, size, place and background, in words and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from . import pictures
from .art import PIXELS
from .pictures import COLOURS

Choice = TypeVar("Choice")
Box = tuple[int, int, int]
"""Edge, top and left of a drawing, in pixels."""

TIMES = {1: "", 2: " twice", 3: " three times"}
PLACES = ("left", "right", "top", "bottom")
SIZES = {  # smallest and largest edge, in pixels
    "any": (84, 112),
    "placed": (64, 80),
    "several": (48, 58),
    "small": (48, 62),
    "large": (114, 122),
}
SHARES = {"plain": 0.46, "size": 0.13, "place": 0.17, "both": 0.06, "times": 0.18}
MARGIN = 6  # pixels that a thing at the left may be off the picture's edge


@dataclass(frozen=True)
class Scene:
    """What a caption says beside the thing itself; None where it says nothing."""

    colour: str | None
    size: str | None = None
    place: str | None = None
    times: int = 1

    def caption(self, words: str) -> str:
        """Such as "a small painted fox at the left on a blue background"."""
        thing = with_article(f"{self.size} {words}" if self.size else words) + TIMES[self.times]
        thing += f" at the {self.place}" if self.place else ""
        return thing + (f" on {with_article(self.colour)} background" if self.colour else "")

    def boxes(self, rng: np.random.Generator) -> list[Box]:
        """A random place for each drawing that suits the words."""
        if self.times > 1:
            half = PIXELS // 2
            edge = _between(rng, SIZES["several"])
            corners = [(cell // 2 * half, cell % 2 * half) for cell in rng.choice(4, self.times, replace=False)]
            loose = rng.integers(half - edge + 1, size=(self.times, 2))
            return [
                (edge, int(top + down), int(left + right))
                for (top, left), (down, right) in zip(corners, loose, strict=True)
            ]
        edge = _between(rng, SIZES[self.size or ("placed" if self.place else "any")])
        top, left = (int(offset) for offset in rng.integers(0, PIXELS - edge + 1, 2))
        near = int(rng.integers(MARGIN + 1))
        far = PIXELS - edge - near
        if self.place in ("left", "right"):
            left = near if self.place == "left" else far
        elif self.place in ("top", "bottom"):
            top = near if self.place == "top" else far
        return [(edge, top, left)]


def with_article(words: str) -> str:
    """Put "a" or "an" before a noun phrase."""
    return ("an " if words[0] in "aeio" or words.startswith("um") else "a ") + words


def random_scene(rng: np.random.Generator) -> Scene:
    """One to train on."""
    kind = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    colour = str(rng.choice(list(COLOURS)))
    if kind == "both":
        return Scene(colour, "small", one_of(rng, PLACES))
    return Scene(
        colour,
        size=one_of(rng, ("small", "large")) if kind == "size" else None,
        place=one_of(rng, PLACES) if kind == "place" else None,
        times=one_of(rng, (2, 3)) if kind == "times" else 1,
    )


def draw(number: int, scene: Scene, rng: np.random.Generator) -> Tensor:
    """A picture in [0, 1] of a scene with a drawing of the bank."""
    assert scene.colour is not None
    picture = pictures.flat(pictures.named(scene.colour, rng))
    for edge, top, left in scene.boxes(rng):
        pictures.paste(picture, pictures.resized(number, edge), top, left)
    return picture


def one_of(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
    """A random one."""
    return choices[int(rng.integers(len(choices)))]


def _between(rng: np.random.Generator, edges: tuple[int, int]) -> int:
    return int(rng.integers(edges[0], edges[1] + 1))
