"""What the scores are called, and the settings of the sheet of the best and the worst images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ..errors import EvaluationError
from ..schema import FilePath, SettingsModel

ScoreName = Literal["clip_i", "clip_t", "dino", "lpips"]
"""The scores of a generated image, as the fields of `SubjectScores` and of the JSON are called."""

LABELS: Mapping[ScoreName, str] = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO", "lpips": "LPIPS"}
"""The same as the literature writes them, in the order of the tables."""

DISTANCES: frozenset[ScoreName] = frozenset({"lpips"})
"""The scores of which less is better."""


def _png(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise EvaluationError(f"The sheet {path} must end in .png, the only format that it is drawn in.")
    return path


class SheetSettings(SettingsModel):
    """The sheet of each subject's best and worst images."""

    error = EvaluationError

    sheet: Annotated[FilePath, AfterValidator(_png), Field(examples=["sheet.png"])]
    """PNG file to draw a sheet into: each subject's best and worst images, beside its photographs."""

    sheet_score: ScoreName = "dino"
    """Score that says which images are the best and the worst; lpips needs --lpips."""

    sheet_images: Annotated[int, Field(ge=1, le=12)] = 4
    """Number of the best images on the sheet, and of the worst, of each subject."""
