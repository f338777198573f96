"""A score for who knows the true drawing: an encoder is asked which of twelve drawings a picture shows, or none.

The encoder compares the picture with the drawings as they look at the same size on the same background. It was trained
on real and on spoilt drawings (`recipes/drawings/encoder.py`); it takes spoilt ones for none of the twelve.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import find_objects, label
from torch import Tensor
from torch.nn import functional
from transformers import ResNetForImageClassification

from diffusekrona.errors import KronAError

from .overlay import ground_of
from .spoiling import from_image, resized

Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""

SIDE = 64
"""Pixels of a view's edge."""

DIFFERENT = (40 / 255, 24 / 255)
"""From the background, in some channel: what belongs to a thing, surely, and where its colour is near."""

LEAST_SHARE = 0.012
"""Of the picture, for a thing; less is a speck."""

GAP = 1 / 32
"""Of the picture; parts that are nearer are one thing."""

COPIES = 4
"""Things that are looked at, the largest first."""

EMPTY = 16
"""Pixels of background around a drawing that is compared with."""

MARGIN = 0.08
"""Around a thing, as a share of its longer side."""


class WhichDrawing:
    """The encoder, ready to be asked about some drawings.

    Args:
        folder: where its config and weights are.
        drawings: RGBA, square; the true one first.

    Raises:
        KronAError: the folder holds no such encoder.
    """

    def __init__(self, folder: str | Path, drawings: Sequence[Image.Image]) -> None:
        if not (Path(folder) / "config.json").is_file():
            raise KronAError(f"{folder} holds no encoder; the repository's is models/drawings-encoder.")
        self._model = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
        scale = getattr(self._model.config, "cosine_scale", None)
        if scale is None:
            raise KronAError(f"{folder} holds another model: its config has no cosine_scale and cosine_of_none.")
        self._scale, self._none = float(scale), float(self._model.config.cosine_of_none)
        self._drawings = [from_image(drawing) for drawing in drawings]

    def ask(self, image: Image.Image) -> list[float]:
        """The probability of each drawing, and of none last.

        Of several things the one counts that is likely the first drawing, else the one that is least likely none.
        """
        picture = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
        answers = [
            self._asked(picture, box, different)
            for different in DIFFERENT
            for box in things_of(picture, different)[:COPIES]
        ]
        nothing = [0.0] * len(self._drawings) + [1.0]
        return max(answers, key=lambda found: (found[0] > 0.5, -found[-1]), default=nothing)

    @torch.no_grad()
    def _asked(self, picture: Tensor, box: Box, different: float) -> list[float]:
        ground, side = ground_of(picture), max(picture.shape[-2:])
        drawn = [_drawn_like(drawing, box, ground, different, side) for drawing in self._drawings]
        views = torch.stack([view_of(picture, box), *drawn])
        features = functional.normalize(self._model(views * 2 - 1).logits, dim=-1)
        cosines = torch.cat([features[1:] @ features[0], torch.tensor([self._none])])
        probabilities: list[float] = (self._scale * cosines).softmax(0).tolist()
        return probabilities


def _drawn_like(drawing: Tensor, box: Box, ground: Tensor, different: float, side: int) -> Tensor:
    """The view of a drawing on a background, as large as what was found in a box.

    The box was found where the picture, whose longer edge is `side`, differs so much from its background.
    """
    edge = max(box[2] - box[0], box[3] - box[1])
    whole = edge + 2 * EMPTY
    small, picture = resized(drawing, edge), ground[:, None, None].repeat(1, whole, whole)
    picture[:, EMPTY:-EMPTY, EMPTY:-EMPTY].mul_(1 - small[3:]).add_(small[:3])
    seen = next(iter(things_of(picture, different, side)), (0, 0, whole, whole))
    return view_of(picture, seen)


def things_of(picture: Tensor, different: float = DIFFERENT[0], side: int | None = None) -> list[Box]:
    """What differs so much from a picture's flat background, (3, height, width) in [0, 1], the largest first.

    Specks and gaps are measured by `side` pixels, by default the picture's longer edge.
    """
    side = side or max(picture.shape[-2:])
    drawn = (picture - ground_of(picture)[:, None, None]).abs().amax(0) > different
    reach = max(1, round(GAP * side / 2))
    near = functional.max_pool2d(drawn.float()[None], 2 * reach + 1, 1, reach)[0] > 0
    numbers, _ = label(near.numpy(), np.ones((3, 3)))
    numbers = numbers * drawn.numpy()
    areas = np.bincount(numbers.ravel())[1:]
    found = find_objects(numbers)
    order = [n for n in np.argsort(-areas, kind="stable") if areas[n] >= LEAST_SHARE * side**2]
    return [(found[n][1].start, found[n][0].start, found[n][1].stop, found[n][0].stop) for n in order]


def view_of(picture: Tensor, box: Box | None = None) -> Tensor:
    """The thing in a box, by default the largest, on a picture as above: (3, 64, 64).

    A picture with nothing on it is seen whole.
    """
    height, width = picture.shape[-2:]
    left, top, right, bottom = box or next(iter(things_of(picture)), (0, 0, width, height))
    half = (0.5 + MARGIN) * max(right - left, bottom - top, 8)
    across, down = (left + right) / width - 1, (top + bottom) / height - 1
    shrink = torch.tensor([[[2 * half / width, 0, across], [0, 2 * half / height, down]]])
    fine = functional.affine_grid(shrink, [1, 3, 2 * SIDE, 2 * SIDE], align_corners=False)
    seen = functional.grid_sample(picture[None], fine, padding_mode="border", align_corners=False)
    return functional.avg_pool2d(seen, 2)[0]
