"""The demo's table: what was measured without and with the adapter."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from .result import DemoResult

_HEAD = ("", "base model", "with KronA")


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


def rich_table(result: DemoResult) -> Table:
    """For the terminal."""
    table = Table(*_HEAD, title="The demo, measured")
    for row in _rows(result):
        table.add_row(*row)
    return table


def write_markdown(result: DemoResult, path: Path) -> None:
    """For a page."""
    lines = [f"| {' | '.join(row)} |" for row in (_HEAD, ("---",) * len(_HEAD), *_rows(result))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
