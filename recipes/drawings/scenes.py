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
SIZES = {"any": 96, "placed": 64, "several": 48, "small": 64, "large": 112}
"""Edges in pixels. Few of them, and places on a grid, so that the denoiser sees the same latents of a drawing often."""
SHARES = {"plain": 0.46, "size": 0.13, "place": 0.17, "both": 0.06, "times": 0.18}
CELL = 32  # pixels; things are moved by whole ones, each of which is four latents wide
MIDDLE_SHARE = 0.75  # of plain pictures whose thing is in the middle


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
            edge, half = SIZES["several"], PIXELS // 2
            inset = (half - edge) // 2
            corners = rng.choice(4, self.times, replace=False)
            return [(edge, corner // 2 * half + inset, corner % 2 * half + inset) for corner in corners.tolist()]
        edge = SIZES[self.size or ("placed" if self.place else "any")]
        room = PIXELS - edge
        top = left = room // 2
        if self.size != "large" and (edge == SIZES["small"] or rng.random() >= MIDDLE_SHARE):
            top, left = (CELL * int(cells) for cells in rng.integers(0, room // CELL + 1, 2))
        if self.place in ("left", "right"):
            left = 0 if self.place == "left" else room
        elif self.place in ("top", "bottom"):
            top = 0 if self.place == "top" else room
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
