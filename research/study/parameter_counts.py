"""Each method's trained parameters beside the paper's counts, counted on models without weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from diffusekrona.storage import write_whole

from .paper_tables import TABLES, Row, components_of, count_of

MODELS = {"sdxl": "SDXL", "sd15": "SD"}


@dataclass(frozen=True)
class CountedRow:
    """A row with our count.

    Attributes:
        row: the paper's.
        count: what the method trains.
        recount: what the row's other way to count gives; None without one.
    """

    row: Row
    count: int
    recount: int | None

    @property
    def agrees(self) -> bool:
        """Whether the paper prints our count, to the digits that it prints."""
        return is_printed(self.count, self.row.printed)

    @property
    def explained(self) -> bool:
        """Whether the paper prints our count, or that of the other way to count."""
        return self.agrees or (self.recount is not None and is_printed(self.recount, self.row.printed))

    @property
    def verdict(self) -> str:
        """A remark on the difference."""
        if self.agrees:
            verdict = "as printed"
        elif self.recount is None or self.row.recount is None:
            verdict = "not reproduced"
        else:
            verdict = f"{self.row.recount.what}: {self.recount:,}"
        return f"{verdict}. {self.row.note}" if self.row.note else verdict


def is_printed(count: int, printed: str) -> bool:
    """Whether a count is what the paper prints: a whole number, or millions cut off or rounded at its last digit."""
    found = re.fullmatch(r"(\d+)(?:\.(\d+))? M|(\d+)", printed)
    if found is None:
        raise ValueError(f"{printed!r} is neither a whole number nor one of millions.")
    if found[3] is not None:
        return count == int(found[3])
    digits = len(found[2] or "")
    unit, value = 10 ** (6 - digits), int(found[1] + (found[2] or ""))
    rounded = (2 * count + unit) // (2 * unit)
    return value in (count // unit, rounded)


def counted(rows: Sequence[Row]) -> list[CountedRow]:
    """Rows with our counts."""
    return [_counted(row) for row in rows]


def _counted(row: Row) -> CountedRow:
    components = components_of(row.model)
    ours = count_of(row.method, components)
    return CountedRow(row, ours, None if row.recount is None else row.recount.count(components))


_HEAD = ("row", "model", "trains", "the paper", "computed", "the difference")


def _cells(one: CountedRow) -> tuple[str, ...]:
    where = "UNet, text encoder" if one.row.method.text_encoders else "UNet"
    return one.row.label, MODELS[one.row.model], where, one.row.printed, f"{one.count:,}", one.verdict


def rich_table(rows: Sequence[CountedRow]) -> Table:
    """The rows as a table for the terminal."""
    table = Table("table", *_HEAD, title="Trained parameters, the paper's and ours")
    for one in rows:
        cells = [escape(cell) for cell in (str(one.row.table), *_cells(one))]
        table.add_row(*cells, style=None if one.agrees else "yellow")
    for column in table.columns[4:6]:
        column.justify, column.no_wrap = "right", True
    return table


def write_markdown(rows: Sequence[CountedRow], path: Path) -> None:
    """For a page, with a section for each of the paper's tables.

    Raises:
        OSError: the file cannot be written; an older one there is as it was.
    """
    agreeing = sum(one.agrees for one in rows)
    explained = sum(one.explained for one in rows) - agreeing
    lines = [
        "# The paper's parameter counts", "",
        "Written by `python -m research.study tables --output FILE`, which counts what each method trains on models "
        "built from their published configurations, without weights. The paper cuts most numbers of millions off after "
        "their last digit.", "",
        f"Of {len(rows)} rows, {agreeing} are as printed, {explained} come out as printed if counted in another way, "
        f"which is said beside them, and {len(rows) - agreeing - explained} cannot be reproduced.",
    ]  # fmt: skip
    for table in TABLES:
        own = [_cells(one) for one in rows if one.row.table == table]
        if own:
            head = (_HEAD, ("---", "---", "---", "---:", "---:", "---"))
            lines += ["", f"## Table {table}", "", *(f"| {' | '.join(row)} |" for row in (*head, *own))]
    write_whole({path: ("\n".join(lines) + "\n").encode()})
