"""A study: it compares arms on subjects and seeds, and makes a page of the measurements."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .cells import Arm, Cell, Spec
from .records import Records
from .results import Results
from .settings import StudySettings, StudySettingsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Page:
    """A study's page.

    Attributes:
        text: Markdown: the question, what was measured, tables.
        figures: by file name, without suffix.
    """

    text: str
    figures: Mapping[str, Figure]


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
    """The paper's claim, and its section."""
    afterwards: ClassVar[str] = "the page"
    """The next stage, once these arms are measured."""

    @abstractmethod
    def arms(self) -> Sequence[Arm]:
        """The arms to compare."""

    @abstractmethod
    def page(self, results: Results) -> Page:
        """The page of these results."""

    def subjects_in(self, settings: StudySettings) -> tuple[str, ...]:
        """Names of the subjects."""
        return settings.open_subjects[: self.subjects]

    def cells(self, settings: StudySettings, records: Records) -> list[Cell]:
        """All cells that are known yet, seed by seed, so that an interrupted study is of use."""
        return self.plain_cells(settings, self.arms())

    def results(self, settings: StudySettings, records: Records) -> Results:
        """What is measured of its subjects and seeds."""
        return Results(self.subjects_in(settings), self.seeds, settings, records)

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


def spec_of(method: Mapping[str, Any], **training: Any) -> Spec:
    """A spec from a method as settings give it: its name and options in one."""
    options = {name: value for name, value in method.items() if name not in ("method", "training")}
    return Spec(method["method"], options, {**method.get("training", {}), **training})
