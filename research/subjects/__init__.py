"""The ten subjects of the base of drawings as they were drawn, and their kin: what judges compare pictures with.

`NAME/true.png` is the subject, and each `NAME/kin/SET.png` a set's drawing of its class: RGBA, 128 × 128, written by
`recipes/drawings`, as are a picture and a small one of each subject that went through the base's autoencoder.
`parts.json` says where their eyes and faces are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from diffusekrona.errors import KronAError

from ..judges.spoiling import Part

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Subject:
    """One subject.

    Attributes:
        name: of its folder.
        eyes: hubs or a gloss where there are none.
        face: its other parts; windows or a band where there is none.
        way: how far to the right and down the first eye moves where eyes are moved; the second goes the other way.
    """

    name: str
    eyes: tuple[Part, ...]
    face: tuple[Part, ...]
    way: tuple[float, float]

    @property
    def ways(self) -> list[tuple[float, float]]:
        """Of each eye."""
        across, down = self.way
        return [(across, down), (-across, down)][: len(self.eyes)]

    def drawing(self) -> Image.Image:
        """The true drawing, RGBA."""
        return _read(HERE / self.name / "true.png")

    def kin(self) -> list[Image.Image]:
        """The same class in other styles."""
        return [_read(file) for file in sorted((HERE / self.name / "kin").glob("*.png"))]

    def twelve(self) -> list[Image.Image]:
        """The true drawing, its kin, and other subjects' drawings, in this order."""
        names = [*subjects()]
        start = names.index(self.name)
        others = [subjects()[name].drawing() for name in names[start + 1 :] + names[:start]]
        return [self.drawing(), *self.kin(), *others][:12]


@cache
def subjects() -> dict[str, Subject]:
    """All subjects by name."""
    table: dict[str, dict[str, Any]] = json.loads((HERE / "parts.json").read_text(encoding="utf-8"))
    return {
        name: Subject(name, tuple(map(tuple, row["eyes"])), tuple(map(tuple, row["face"])), tuple(row["way"]))
        for name, row in table.items()
    }


def subject(name: str) -> Subject:
    """One subject.

    Raises:
        KronAError: there is none of that name.
    """
    if name not in subjects():
        raise KronAError(f"There is no subject {name!r}; there are {', '.join(subjects())}.")
    return subjects()[name]


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGBA")
