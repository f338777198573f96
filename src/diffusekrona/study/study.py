"""A study: which arms are compared on which subjects and seeds, and what is to be seen in the measurements."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .cells import Arm, Cell, Spec
from .records import Records
from .settings import StudySettings, StudySettingsError
from .sheets import pictures_on
from .statistics import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


@dataclass(frozen=True)
class Page:
    """What comes of a study.

    Attributes:
        text: Markdown: the question, what was measured, tables.
        figures: by file name, without suffix.
    """

    text: str
    figures: Mapping[str, Figure]


class Results:
    """The records of a study's arms."""

    def __init__(self, study: Study, settings: StudySettings, records: Records) -> None:
        self._study, self._settings, self._records = study, settings, records

    def of(self, study: Study) -> Results:
        """The same records, of another study's subjects and seeds."""
        return Results(study, self._settings, self._records)

    def found(self, arm: Arm, what: str) -> list[list[float]]:
        """One number of every cell of an arm, a list for each subject; cells that diverged have none."""
        return [list(by_seed.values()) for by_seed in self._by_subject(arm, what).values() if by_seed]

    def _by_subject(self, arm: Arm, what: str) -> dict[str, dict[int, float]]:
        groups: dict[str, dict[int, float]] = {}
        for subject in self._study.subjects_in(self._settings):
            cells = [Cell(arm.spec, arm.view, subject, seed) for seed in self._study.seeds]
            values = {cell.seed: _deep(self._records[cell].found, what) for cell in cells if cell in self._records}
            groups[subject] = {seed: float(value) for seed, value in values.items() if value is not None}
        return groups

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
        """Of every cell of an arm the harmonic mean of fidelity (DINO) and of the share that is as asked.

        Where that share is not known, CLIP-T stands for it. Models that diverged have none of either.
        """
        cells = [
            [Cell(arm.spec, arm.view, subject, seed) for seed in self._study.seeds]
            for subject in self._study.subjects_in(self._settings)
        ]
        return [[_quality(self._records[cell].found) for cell in group if cell in self._records] for group in cells]

    def pictures(self, arms: Sequence[Arm]) -> list[dict[str, Image.Image]] | None:
        """Each arm's pictures by prompt, of the first subject and seed of which there are pictures of all arms."""
        for subject in self._study.subjects_in(self._settings):
            for seed in self._study.seeds:
                sheets = [self._records.sheet_of(Cell(arm.spec, arm.view, subject, seed)) for arm in arms]
                if all(sheet.exists() for sheet in sheets):
                    prompts = self._settings.prompts
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


@dataclass(frozen=True)
class Study:
    """Arms on subjects with seeds.

    Args:
        subjects: how many of the open subjects, in their order; None is all.
        seeds: of the trainings.
    """

    subjects: int | None = None
    seeds: tuple[int, ...] = (0,)

    name: ClassVar[str]
    question: ClassVar[str]
    """What the paper claims, and where."""
    afterwards: ClassVar[str] = "the page"
    """What is done once these are measured."""

    @abstractmethod
    def arms(self) -> Sequence[Arm]:
        """All that is compared."""

    @abstractmethod
    def page(self, results: Results) -> Page:
        """What is to be seen."""

    def subjects_in(self, settings: StudySettings) -> tuple[str, ...]:
        """Names of the subjects."""
        return settings.open_subjects[: self.subjects]

    def cells(self, settings: StudySettings, records: Records) -> list[Cell]:
        """All that is to be measured, as far as is known yet: seed by seed, so that a part of it is of use."""
        return self.plain_cells(settings, self.arms())

    def plain_cells(self, settings: StudySettings, arms: Sequence[Arm]) -> list[Cell]:
        """Every arm on every subject with every seed."""
        return [
            Cell(arm.spec, arm.view, subject, seed)
            for seed in self.seeds
            for subject in self.subjects_in(settings)
            for arm in arms
        ]

    def with_values(self, values: Mapping[str, Any]) -> Study:
        """Itself with some fields replaced.

        Raises:
            StudySettingsError: there is no such field.
        """
        known = [one.name for one in fields(self)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise StudySettingsError(
                    f"The study {self.name} has no {name!r}"
                    + (f"; did you mean {near[0]!r}?" if near else f". It has {', '.join(known)}.")
                )
        return replace(self, **{name: _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value


SCORES: Mapping[str, str] = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "obeyed": "as asked",
    "drift": "drift",
}
"""What is shown of each arm, and its heading. "As asked" is known on the small base alone."""


def arms_table(arms: Sequence[Arm], results: Results, more: Mapping[str, Callable[[Arm], str]] | None = None) -> str:
    """A Markdown table: a row for each arm; means with intervals over subjects and seeds."""
    shown = [what for what in SCORES if any(results.found(arm, what) for arm in arms)]
    heads = ["", *(SCORES[what] for what in shown), *(more or {})]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for arm in arms:
        row = [arm.label, *(str(results.estimate(arm, what)) for what in shown)]
        if failures := results.diverged(arm):
            row[0] += f" ({failures} diverged)"
        lines.append(f"| {' | '.join([*row, *(of(arm) for of in (more or {}).values())])} |")
    return "\n".join(lines)


def difference_table(arms: Sequence[Arm], other: Arm, results: Results) -> str:
    """A Markdown table of each arm's scores minus another's, subject by subject and seed by seed."""
    shown = [what for what in SCORES if results.found(other, what)]
    lines = [f"| minus {other.label} | {' | '.join(SCORES[what] for what in shown)} |", "|" + "---|" * (len(shown) + 1)]
    for arm in arms:
        values = [str(results.difference(arm, other, what)) for what in shown]
        lines.append(f"| {arm.label} | {' | '.join(values)} |")
    return "\n".join(lines)


def number(results: Results, what: str, form: str, unit: float = 1.0) -> Callable[[Arm], str]:
    """Of an arm's cells the mean of a number, for `arms_table`; the base alone has no costs.

    Args:
        results: of the study.
        what: the number's name.
        form: to write it in, such as ",.0f".
        unit: to divide it by.
    """

    def shown(arm: Arm) -> str:
        found = results.estimate(arm, what)
        return format(found.mean / unit, form) if found.count else "–"

    return shown


def spec_of(method: Mapping[str, Any], images: int | None = None, **training: Any) -> Spec:
    """A spec from a method as settings give it: its name and options in one."""
    options = {name: value for name, value in method.items() if name not in ("method", "training")}
    return Spec(method["method"], options, {**method.get("training", {}), **training}, images)


def quality(results: Results, arm: Arm) -> Estimate:
    """Mean and interval of `Results.qualities`."""
    return estimate(results.qualities(arm))


def best_of_each(arms: Sequence[Arm], results: Results) -> list[Arm]:
    """Of the arms with equal labels, which differ in the learning rate, the one with the best quality."""
    lines: dict[str, list[Arm]] = {}
    for arm in arms:
        lines.setdefault(arm.label, []).append(arm)
    return [max(line, key=lambda arm: quality(results, arm).mean) for line in lines.values()]


def learning_rate(arm: Arm) -> str:
    """An arm's, for `arms_table`; the base alone has none."""
    rate = arm.spec.training.get("learning_rate")
    return "–" if rate is None else f"{rate:g}"
