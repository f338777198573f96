"""Reads a picture's pixels: the background, and number, sizes and places of the things on it.

All backgrounds are flat, so no model is needed that might err as the base errs.
"""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .pictures import COLOURS
from .scenes import TIMES

DIFFERENT = 40 / 255  # in some channel, from the background
LEAST_SHARE = 0.012  # of the picture, for a thing; less is a speck
REACH = 2  # pixels; parts whose distance is up to twice this are one thing
SMALL, LARGE = 0.54, 0.72  # of the picture's edge: at most, and at least, the longer side of a thing
NEAR = 0.44  # of the picture's edge: how far from the left the middle of "at the left" may be
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the picture's edges."""


def background_of(picture: Tensor) -> tuple[str, Tensor]:
    """Name of a picture's background, (3, height, width) in [0, 1], and its colour: the median of the frame."""
    frame = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
    ground = frame.median(dim=1).values
    named = torch.tensor(list(COLOURS.values())) / 255
    return list(COLOURS)[int((named - ground).square().sum(1).argmin())], ground


def things_in(picture: Tensor, ground: Tensor) -> list[Box]:
    """Of the parts that differ from the background, the largest first."""
    drawn = (picture - ground[:, None, None]).abs().amax(0) > DIFFERENT
    near = F.max_pool2d(drawn.float()[None, None], 2 * REACH + 1, 1, REACH)
    number = torch.arange(1, near.numel() + 1, dtype=torch.float32).view_as(near) * near
    while True:  # the largest number of each part spreads all over it
        spread = F.max_pool2d(number, 3, 1, 1) * near
        if torch.equal(spread, number):
            break
        number = spread
    parts = [(number[0, 0] == value) & drawn for value in number.unique() if value > 0]
    large = [part for part in parts if part.float().mean() >= LEAST_SHARE]
    return [box_of(part) for part in sorted(large, key=lambda part: -int(part.sum()))]


def box_of(part: Tensor) -> Box:
    """Bounds of a mask."""
    (height, width), rows, columns = part.shape, part.any(1).nonzero(), part.any(0).nonzero()
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return left / width, top / height, right / width, bottom / height


def obeyed(picture: Tensor, prompt: str) -> dict[str, bool]:
    """Whether a picture has the "background", "size", "place" and "times" (number) that its prompt names.

    A prompt without a number asks for one thing.
    """
    colour, ground = background_of(picture)
    boxes = things_in(picture, ground)
    asked = next((n for n, words in TIMES.items() if words and words in prompt), 1)
    found = {"times": len(boxes) == asked}
    if named := re.search(rf"({'|'.join(COLOURS)}) background", prompt):
        found["background"] = colour == named[1]
    left, top, right, bottom = boxes[0] if boxes else (0.5, 0.5, 0.5, 0.5)
    if place := re.search(r"at the (left|right|top|bottom)", prompt):
        middle = (left + right) / 2 if place[1] in ("left", "right") else (top + bottom) / 2
        found["place"] = middle < NEAR if place[1] in ("left", "top") else middle > 1 - NEAR
    if size := re.search(r"\b(small|large)\b", prompt):
        edge = max(right - left, bottom - top)
        found["size"] = bool(boxes) and (edge <= SMALL if size[1] == "small" else edge >= LARGE)
    return found


def shares(answers: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """The share of right answers of several pictures, by kind."""
    kinds = sorted({kind for answer in answers for kind in answer})
    rights = {kind: [answer[kind] for answer in answers if kind in answer] for kind in kinds}
    return {kind: round(sum(right) / len(right), 4) for kind, right in rights.items()}
