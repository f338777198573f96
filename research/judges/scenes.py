"""Reads the small base's pictures: the background, and number, sizes and places of the things on it.

The small base (`recipes/base`) draws on flat backgrounds, so all of this can be read off the pixels, exactly and
without a model that might err as the base errs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

COLOURS = {
    "red": (215, 38, 38),
    "orange": (255, 140, 15),
    "yellow": (250, 222, 45),
    "green": (40, 155, 65),
    "blue": (40, 90, 220),
    "purple": (125, 50, 175),
    "pink": (250, 160, 200),
    "brown": (115, 70, 35),
    "gray": (130, 130, 130),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
"""The backgrounds' names and their red, green and blue of 255."""

TIMES = {"twice": 2, "three times": 3}
DIFFERENT = 40  # levels of 255, in some channel, from the background
LEAST_SHARE = 0.012  # of the picture, for a thing; less is a speck
GAP = 1 / 32  # of the picture; parts that are nearer are one thing
SMALL, LARGE = 0.54, 0.72  # of the picture's edge: at most, and at least, the longer side of a thing
NEAR = 0.44  # of the picture's edge: how far from the left the middle of "at the left" may be


@dataclass(frozen=True)
class Scene:
    """What is seen.

    Attributes:
        colour: name of the background.
        boxes: left, top, right and bottom of each thing, as shares of the picture's edges.
    """

    colour: str
    boxes: tuple[tuple[float, float, float, float], ...]


def read_scene(image: Image.Image) -> Scene:
    """Background and things of a picture."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)
    frame = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=1)
    ground = frame.median(dim=1).values
    named = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    colour = list(COLOURS)[int((named - ground).square().sum(1).argmin())]
    drawn = (pixels - ground[:, None, None]).abs().amax(0) > DIFFERENT
    return Scene(colour, tuple(_boxes(drawn)))


def obeyed(image: Image.Image, prompt: str) -> dict[str, bool]:
    """Whether a picture has the "background", "size", "place" and "times" (number) that its prompt names.

    A prompt without a number asks for one thing.
    """
    scene = read_scene(image)
    found = {"times": len(scene.boxes) == next((n for words, n in TIMES.items() if words in prompt), 1)}
    if ground := re.search(rf"({'|'.join(COLOURS)}) background", prompt):
        found["background"] = scene.colour == ground[1]
    if place := re.search(r"at the (left|right|top|bottom)", prompt):
        found["place"] = _is_at(place[1], scene)
    if size := re.search(r"\b(small|large)\b", prompt):
        found["size"] = _is_sized(size[1], scene)
    return found


def shares(answers: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """The share of right answers of several pictures, by kind, and of all kinds together as "obeyed"."""
    kinds = sorted({kind for answer in answers for kind in answer})
    by_kind = {kind: [answer[kind] for answer in answers if kind in answer] for kind in kinds}
    every = [right for rights in by_kind.values() for right in rights]
    return {kind: sum(rights) / len(rights) for kind, rights in by_kind.items()} | {"obeyed": sum(every) / len(every)}


def _is_at(place: str, scene: Scene) -> bool:
    if not scene.boxes:
        return False
    left, top, right, bottom = scene.boxes[0]
    middle = (left + right) / 2 if place in ("left", "right") else (top + bottom) / 2
    return middle < NEAR if place in ("left", "top") else middle > 1 - NEAR


def _is_sized(size: str, scene: Scene) -> bool:
    if not scene.boxes:
        return False
    left, top, right, bottom = scene.boxes[0]
    edge = max(right - left, bottom - top)
    return edge <= SMALL if size == "small" else edge >= LARGE


def _boxes(drawn: Tensor) -> list[tuple[float, float, float, float]]:
    """Of the connected parts of a mask, the largest first."""
    height, width = drawn.shape
    parts = _parts(drawn)
    things = [part & drawn for part in parts]
    things = sorted((part for part in things if part.float().mean() >= LEAST_SHARE), key=lambda part: -int(part.sum()))
    boxes = []
    for part in things:
        rows, columns = part.any(1).nonzero().flatten(), part.any(0).nonzero().flatten()
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        boxes.append((left / width, top / height, right / width, bottom / height))
    return boxes


def _parts(drawn: Tensor) -> list[Tensor]:
    """Masks of the parts that hang together once gaps are closed."""
    reach = max(1, round(GAP * max(drawn.shape) / 2))
    near = functional.max_pool2d(drawn.float()[None, None], 2 * reach + 1, 1, reach)
    number = torch.arange(1, near.numel() + 1, dtype=torch.float32).view_as(near) * near
    while True:  # the largest number of each part spreads all over it
        spread = functional.max_pool2d(number, 3, 1, 1) * near
        if torch.equal(spread, number):
            break
        number = spread
    return [number[0, 0] == value for value in number.unique() if value > 0]
