"""The measurements of a study's arms, by subject and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .cells import Arm, Cell
from .estimate import Estimate, estimate
from .records import Records
from .settings import StudySettings
from .sheets import pictures_on


@dataclass(frozen=True)
class Results:
    """The records of arms on subjects with seeds.

    Attributes:
        subjects: their names.
        seeds: of the trainings.
        settings: of all studies.
        records: all that is measured, of these subjects and seeds and of others.
    """

    subjects: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: StudySettings
    records: Records

    def found(self, arm: Arm, what: str) -> list[list[float]]:
        """One number of every cell of an arm, a list for each subject; cells that diverged have none."""
        return [list(by_seed.values()) for by_seed in self._by_subject(arm, what).values() if by_seed]

    def _by_subject(self, arm: Arm, what: str) -> dict[str, dict[int, float]]:
        groups: dict[str, dict[int, float]] = {}
        for subject, cells in self._measured(arm).items():
            values = {cell.seed: _deep(self.records[cell].found, what) for cell in cells}
            groups[subject] = {seed: float(value) for seed, value in values.items() if value is not None}
        return groups

    def _measured(self, arm: Arm) -> dict[str, list[Cell]]:
        """An arm's cells that have a record, by subject."""
        cells = {subject: [Cell(arm.spec, arm.view, subject, seed) for seed in self.seeds] for subject in self.subjects}
        return {subject: [cell for cell in group if cell in self.records] for subject, group in cells.items()}

    def estimate(self, arm: Arm, what: str) -> Estimate:
        """Mean and interval of one number."""
        return estimate(self.found(arm, what))

    def difference(self, arm: Arm, other: Arm, what: str) -> Estimate:
        """Mean and interval of an arm's number minus another's of the same subject and seed."""
        ones, twos = self._by_subject(arm, what), self._by_subject(other, what)
        return estimate(
            [
                [value - twos[subject][seed] for seed, value in by_seed.items() if seed in twos[subject]]
                for subject, by_seed in ones.items()
            ]
        )

    def qualities(self, arm: Arm) -> list[list[float]]:
        """For every cell of an arm, the harmonic mean of fidelity (DINO) and of the share that is as asked.

        Where that share is not known, CLIP-T stands for it. Models that diverged have none of either.
        """
        return [[_quality(self.records[cell].found) for cell in group] for group in self._measured(arm).values()]

    def pictures(self, arms: Sequence[Arm]) -> list[dict[str, Image.Image]] | None:
        """Each arm's pictures by prompt, for the first subject and seed that have pictures of all arms."""
        for subject in self.subjects:
            for seed in self.seeds:
                sheets = [self.records.sheet_of(Cell(arm.spec, arm.view, subject, seed)) for arm in arms]
                if all(sheet.exists() for sheet in sheets):
                    prompts = self.settings.prompts
                    rows = [pictures_on(sheet, len(prompts)) for sheet in sheets]
                    return [dict(zip(prompts, row, strict=True)) for row in rows]
        return None

    def diverged(self, arm: Arm) -> int:
        """How many of an arm's models diverged."""
        return sum(int(value) for group in self.found(arm, "diverged") for value in group)


def _deep(found: Mapping[str, Any], what: str) -> Any:
    """A number by its name, or within another by "spectrum.rank90"."""
    value: Any = found
    for part in what.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _quality(found: Mapping[str, Any]) -> float:
    fidelity = found.get("dino", 0.0)
    obedience = found.get("obeyed", found.get("clip_t", 0.0))
    return 2 / (1 / fidelity + 1 / obedience) if fidelity > 0 and obedience > 0 else 0.0


def quality(results: Results, arm: Arm) -> Estimate:
    """Mean and interval of `Results.qualities`."""
    return estimate(results.qualities(arm))


def best_of(arms: Sequence[Arm], results: Results) -> Arm:
    """The arm with the best quality."""
    return max(arms, key=lambda arm: quality(results, arm).mean)


def best_of_each(arms: Sequence[Arm], results: Results) -> list[Arm]:
    """Of the arms with equal labels, which differ in the learning rate, the one with the best quality."""
    lines: dict[str, list[Arm]] = {}
    for arm in arms:
        lines.setdefault(arm.label, []).append(arm)
    return [best_of(line, results) for line in lines.values()]
