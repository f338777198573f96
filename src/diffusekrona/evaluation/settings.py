"""What the scores are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

ScoreName = Literal["clip_i", "clip_t", "dino", "lpips"]
"""The scores of a generated image, as the fields of `SubjectScores` and of the JSON are called."""

LABELS: Mapping[ScoreName, str] = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO", "lpips": "LPIPS"}
"""The same as the literature writes them, in the order of the tables."""
