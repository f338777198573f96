"""The paper's scores of each adapter that a run saved, and which is best."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluation import Encoders, evaluate_subject
from ..generation import generate_images
from ..pipeline import load_krona, unload_krona

_NAME = "scored"
"""Of an adapter in the pipeline while its pictures are drawn."""


@dataclass(frozen=True)
class AdapterScores:
    """Mean scores of an adapter's pictures, cosine similarities from −1 to 1.

    Attributes:
        file: the adapter.
        clip_i: likeness to the subject's images, by CLIP.
        clip_t: likeness to the prompts, by CLIP.
        dino: likeness to the subject's images, by DINO.
    """

    file: str
    clip_i: float
    clip_t: float
    dino: float


def score_adapters(
    pipe: Any,
    adapters: Sequence[Path],
    prompts: Sequence[str],
    real: Sequence[Image.Image],
    encoders: Encoders,
    **options: Any,
) -> list[AdapterScores]:
    """Draw prompts with each adapter and compare the pictures with the subject's own images.

    Args:
        pipe: the base, without adapters; it is without them again afterwards.
        adapters: files or folders.
        prompts: a picture of each.
        real: images of the subject.
        encoders: CLIP and DINO.
        options: of `generate_images`, such as `seed` and `steps`.
    """
    found = []
    for path in adapters:
        load_krona(pipe, path, _NAME)
        try:
            pictures = generate_images(pipe, prompts, **options)
        finally:
            unload_krona(pipe, _NAME)
        scores = evaluate_subject(encoders, real, pictures, prompts)
        means = {name: getattr(scores, name).mean for name in ("clip_i", "clip_t", "dino")}
        found.append(AdapterScores(path.name, **means))
    return found


def best_of(scores: Sequence[AdapterScores]) -> AdapterScores:
    """The adapter with the best mean place among all in the three scores; of equals the first."""

    def place(one: AdapterScores, name: str) -> int:
        return sum(getattr(other, name) > getattr(one, name) for other in scores)

    return min(scores, key=lambda one: sum(place(one, name) for name in ("clip_i", "clip_t", "dino")))


def scores_json(scores: Sequence[AdapterScores]) -> str:
    """All scores, and the file of the best adapter."""
    return json.dumps({"best": best_of(scores).file, "adapters": [asdict(one) for one in scores]}, indent=2) + "\n"


def scores_rows(scores: Sequence[AdapterScores]) -> Mapping[str, str]:
    """A line for each adapter by its file's name, for a report."""
    best = best_of(scores)
    return {
        one.file: f"CLIP-I {one.clip_i:.3f}, CLIP-T {one.clip_t:.3f}, DINO {one.dino:.3f}"
        + (" (best)" if one is best else "")
        for one in scores
    }
