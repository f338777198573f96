"""The result of an evaluation: JSON with every image's scores, and a table of means and spreads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EvaluationError
from ..storage import write_whole
from .metrics import Score
from .settings import LABELS, ScoreName

if TYPE_CHECKING:
    from rich.table import Table

_SUFFIXES = (".json", ".md")


@dataclass(frozen=True)
class SubjectScores:
    """The scores of one subject (Appendix C); each has one value per generated image, in the order of `files`.

    Attributes:
        name: of the subject.
        real: how many real images there are.
        files: the names of the generated images.
        prompts: the text that CLIP-T compared with each of them.
        clip_i: mean similarity of each image to the real ones, in CLIP's features.
        clip_t: similarity of each image to its prompt.
        dino: mean similarity of each image to the real ones, in DINO's features.
        lpips: mean distance of each image to the real ones; None if not measured.
    """

    name: str
    real: int
    files: tuple[str, ...]
    prompts: tuple[str, ...]
    clip_i: Score
    clip_t: Score
    dino: Score
    lpips: Score | None = None

    @property
    def measured(self) -> tuple[ScoreName, ...]:
        """The names of the scores that it has."""
        return tuple(name for name in LABELS if getattr(self, name) is not None)

    def score(self, name: str) -> Score:
        """The score of that name.

        Raises:
            EvaluationError: it was not measured.
        """
        found: Score | None = getattr(self, name)
        if found is None:
            raise EvaluationError(f"{name} was not measured; give the encoders the weights of its network.")
        return found


@dataclass(frozen=True)
class Evaluation:
    """All that was measured.

    Attributes:
        models: the encoders that were used, "clip", "dino" and "lpips", as they were asked for.
        revisions: the hub's commit of each; None for a folder.
        drop_words: words left out of the prompts.
        subjects: their scores; empty where only drift was measured.
        drift: of each pair of images, or None.
        drift_files: the names of these images.
        lpips_network: "vgg" or "alex", the network of LPIPS; None if it was not measured.
    """

    models: Mapping[str, str]
    revisions: Mapping[str, str | None]
    drop_words: tuple[str, ...]
    subjects: tuple[SubjectScores, ...]
    drift: Score | None = None
    drift_files: tuple[str, ...] = ()
    lpips_network: str | None = None

    @property
    def measured(self) -> tuple[ScoreName, ...]:
        """The names of the scores that all subjects have; none without subjects."""
        return tuple(name for name in LABELS if self.subjects and all(name in each.measured for each in self.subjects))

    def over_subjects(self, score: str) -> Score:
        """The mean of each subject as one value, so that every subject counts alike."""
        return Score(tuple(subject.score(score).mean for subject in self.subjects))

    def over_images(self, score: str) -> Score:
        """The values of all generated images of all subjects."""
        return Score(tuple(value for subject in self.subjects for value in subject.score(score).values))

    def as_json(self) -> dict[str, Any]:
        """The object that `write` writes; docs/evaluation.md names its fields."""
        overall = {
            over: {name: _summary(score(name)) for name in self.measured}
            for over, score in (("subjects", self.over_subjects), ("images", self.over_images))
        }
        return {
            "models": {name: self._model_json(name) for name in self.models},
            "drop_words": list(self.drop_words),
            "subjects": [_subject_json(subject) for subject in self.subjects],
            "overall": overall if self.subjects else None,
            "drift": None if self.drift is None else _score_json(self.drift, self.drift_files),
        }

    def table(self) -> Table:
        """The scores as a table for the terminal: mean ± spread."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(*self._head(), title="Scores")
        for row in self._rows():
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """The same table in Markdown."""
        head = self._head()
        rows = (head, ("---",) * len(head), *self._rows())
        return "\n".join(f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |" for row in rows) + "\n"

    def write(self, *paths: Path) -> None:
        """Write files whole or not at all: the JSON object where a path ends in .json, the table where in .md.

        Raises:
            EvaluationError: a path ends otherwise.
            OSError: a file cannot be written.
        """
        check_outputs(paths)
        text = json.dumps(self.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole({path: (text if path.suffix == ".json" else self.markdown()).encode() for path in paths})

    def _model_json(self, name: str) -> dict[str, str | None]:
        found = {"source": self.models[name], "revision": self.revisions[name]}
        return {**found, "network": self.lpips_network} if name == "lpips" else found

    def _columns(self) -> list[ScoreName]:
        """The scores of the table: the paper's three, and others where they were measured."""
        return [name for name in LABELS if name != "lpips" or name in self.measured]

    def _head(self) -> tuple[str, ...]:
        return ("subject", "real", "generated", *(LABELS[name] for name in self._columns()), "drift")

    def _row(self, name: str, real: int, generated: int, score: Callable[[str], Score]) -> tuple[str, ...]:
        return (name, f"{real}", f"{generated}", *(_cell(score(each)) for each in self._columns()), "")

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [self._row(each.name, each.real, len(each.files), each.score) for each in self.subjects]
        if len(self.subjects) > 1:
            real, generated = sum(each.real for each in self.subjects), sum(len(each.files) for each in self.subjects)
            rows.append(self._row("mean of the subjects", real, generated, self.over_subjects))
            rows.append(self._row("all images", real, generated, self.over_images))
        if self.drift is not None:
            empty = ("",) * len(self._columns())
            rows.append(("without the subject", "", f"{len(self.drift_files)}", *empty, _cell(self.drift)))
        return rows


def check_outputs(paths: Sequence[Path]) -> None:
    """Check that each path ends in .json or .md.

    Raises:
        EvaluationError: one does not.
    """
    for path in paths:
        if path.suffix not in _SUFFIXES:
            raise EvaluationError(f"{path} must end in {' or '.join(_SUFFIXES)}: numbers of every image, or the table.")


def _cell(score: Score) -> str:
    return f"{score.mean:.3f} ± {score.spread:.3f}"


def _subject_json(subject: SubjectScores) -> dict[str, Any]:
    return {
        "name": subject.name,
        "real": subject.real,
        "generated": len(subject.files),
        "prompts": dict(zip(subject.files, subject.prompts, strict=True)),
        **{name: _score_json(subject.score(name), subject.files) for name in subject.measured},
        "images": _images_json(subject),
    }


def _images_json(subject: SubjectScores) -> list[dict[str, Any]]:
    """Each generated image with its prompt, as it was compared, and its scores."""
    scores = {name: subject.score(name).values for name in subject.measured}
    return [
        {"file_name": file, "prompt": prompt, **{name: values[number] for name, values in scores.items()}}
        for number, (file, prompt) in enumerate(zip(subject.files, subject.prompts, strict=True))
    ]


def _score_json(score: Score, files: Sequence[str]) -> dict[str, Any]:
    return {**_summary(score), "images": dict(zip(files, score.values, strict=True))}


def _summary(score: Score) -> dict[str, float]:
    return {"mean": score.mean, "spread": score.spread}
