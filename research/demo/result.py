"""What the demo measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        parameters: trainable parameters of the adapter.
        share: of the base's parameters.
        file_bytes: size of the saved adapter.
        training_seconds: optimizer steps alone.
        seconds: the whole demo.
        similarity_base: of the base's answers to the subject's pictures, by the judge's features, at most 1.
        similarity_krona: the same with the adapter.
        similarity_ceiling: of the subject's pictures among themselves.
        background_base: share of the base's pictures with the background asked for.
        background_krona: the same with the adapter.
        merged_difference: largest difference of a pixel level, of 255, between merged and unmerged pictures.
        unmerge_exact: whether unmerging gave back every bit of the base's weights.
        stored_entries: share of the adapted weights that an exact unmerge had to store.
        picture: path of the picture.
    """

    parameters: int
    share: float
    file_bytes: int
    training_seconds: float
    seconds: float
    similarity_base: float
    similarity_krona: float
    similarity_ceiling: float
    background_base: float
    background_krona: float
    merged_difference: int
    unmerge_exact: bool
    stored_entries: float
    picture: Path
