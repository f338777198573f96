"""The demo's measurements and their table, without and with the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

_HEAD = ("", "base model", "with KronA")


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        parameters: trainable parameters of the adapter.
        share: of the base's parameters.
        file_bytes: size of the saved adapter.
        training_seconds: optimizer steps alone.
        seconds: the whole demo.
        similarity_base: of the base's pictures to the subject's, by the judge's features, at most 1.
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


def rich_table(result: DemoResult) -> Table:
    """The table for the terminal."""
    table = Table(*_HEAD, title="The demo, measured")
    for row in _rows(result):
        table.add_row(*row)
    return table


def write_markdown(result: DemoResult, path: Path) -> None:
    """Write the table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (_HEAD, ("---",) * len(_HEAD), *_rows(result))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rows(result: DemoResult) -> list[tuple[str, str, str]]:
    return [
        ("trained parameters", "", f"{result.parameters:,} ({result.share:.2%} of the UNet's)"),
        ("file size", "", f"{result.file_bytes / 1e3:.0f} kB"),
        ("training time", "", f"{result.training_seconds:.0f} s"),
        (
            "subject similarity",
            f"{result.similarity_base:.3f}",
            f"{result.similarity_krona:.3f} (the subject's own pictures: {result.similarity_ceiling:.3f})",
        ),
        ("background as asked", f"{result.background_base:.0%}", f"{result.background_krona:.0%}"),
        ("largest difference, merged to unmerged", "", f"{result.merged_difference} of 255 levels"),
        (
            "weights after unmerging",
            "",
            f"{'every bit restored' if result.unmerge_exact else 'NOT restored'}, "
            f"{result.stored_entries:.2%} of the entries kept for it",
        ),
        ("the whole demo", "", f"{result.seconds:.0f} s"),
    ]
