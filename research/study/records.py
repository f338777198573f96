"""Measurements in a file of JSON lines, which a killed study goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusekrona.errors import KronAError

from .cells import Cell


@dataclass(frozen=True)
class Record:
    """A cell and what was found.

    Attributes:
        cell: what was measured.
        found: numbers by name, such as "dino"; the same names for every cell of a study.
        sheet: a JPEG of the pictures of all prompts in a row, in small; for people to look at.
    """

    cell: Cell
    found: Mapping[str, Any]
    sheet: bytes | None = None


class Records:
    """The measurements of one setting (`about`), by their cells' keys.

    Args:
        file: made with the first record.
        about: what all of them share, such as the base and the prompts; a file of other settings is refused.

    Raises:
        KronAError: the file is of other settings, or is not such a file.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        self._file, self._about = file, json.loads(json.dumps(about, default=list))
        self._by_key: dict[str, Record] = {}
        self._ends_within_a_line = False
        if file.exists():
            self._read()

    def _read(self) -> None:
        text = self._file.read_text(encoding="utf-8")
        head, *lines = text.split("\n")
        try:
            about = json.loads(head)["about"]
        except (ValueError, KeyError, TypeError) as error:
            raise KronAError(f"{self._file} is no file of measurements: its first line should say what of.") from error
        if about != self._about:
            names = sorted(name for name in {*about, *self._about} if about.get(name) != self._about.get(name))
            raise KronAError(
                f"{self._file} was measured with other settings ({', '.join(names)}). Give another output folder, or "
                "move that file away."
            )
        self._ends_within_a_line = bool(lines) and lines[-1] != ""
        for line in lines:
            try:
                values = json.loads(line)
            except ValueError:
                continue  # a killed process left it unfinished: what it said is measured again
            record = Record(Cell.from_dict(values["cell"]), values["found"])
            self._by_key[record.cell.key] = record

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self._by_key

    def __getitem__(self, cell: Cell) -> Record:
        return self._by_key[cell.key]

    def sheet_of(self, cell: Cell) -> Path:
        """Where a cell's pictures are, if they were kept."""
        return self._file.parent / "pictures" / f"{cell.key}.jpg"

    def add(self, record: Record) -> None:
        """Keep a measurement, on the disk before this returns."""
        if record.sheet is not None:
            self.sheet_of(record.cell).parent.mkdir(parents=True, exist_ok=True)
            self.sheet_of(record.cell).write_bytes(record.sheet)
        line = json.dumps({"cell": record.cell.as_dict(), "found": record.found}, default=list) + "\n"
        if not self._file.exists():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"about": self._about}) + "\n" + line
        elif self._ends_within_a_line:
            line, self._ends_within_a_line = "\n" + line, False
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._by_key[record.cell.key] = record
