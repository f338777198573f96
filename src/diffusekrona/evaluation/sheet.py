"""A sheet of each subject's best and worst images, beside its photographs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from ..errors import EvaluationError
from ..inputs.images import figure_png, read_image, upright_rgb
from .settings import DISTANCES, LABELS, ScoreName, SheetSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .folders import ImageFolders, SubjectFolder
    from .result import Evaluation, SubjectScores

MOST_SUBJECTS = 40
"""On a sheet: matplotlib draws up to 65,536 pixels, and each subject takes two rows of about 300."""

_PIXELS = 320
"""Of a side of the squares that images are fitted into, which are shown at about 240."""

_BEST, _WORST, _REAL, _TEXT = "#1b7837", "#b2182b", "#666666", "#333333"


def left_out(path: Path) -> str | None:
    """A line that says why the sheet is not drawn; None where it can be."""
    if find_spec("matplotlib") is not None:
        return None
    return f"The sheet {path} is left out, for want of matplotlib. To have it, pip install 'diffusekrona[train]'."


def draw_sheet(evaluation: Evaluation, images: ImageFolders, settings: SheetSettings) -> bytes:
    """A PNG with two rows for each subject, of its best and of its worst generated images by a score.

    A row begins with a photograph of the subject. Beneath each image stand its file's name, its score and its prompt.
    Of fewer images than two rows take, the better half is in the first.

    Args:
        evaluation: what `evaluate_folders` found.
        images: the same that it took.
        settings: the score and the number of images; `sheet` is not written.

    Raises:
        EvaluationError: there are no subjects or too many, or the score was not measured.
        DatasetError: an image cannot be read any more.
    """
    return figure_png(sheet_figure(evaluation, images, settings))


def sheet_figure(evaluation: Evaluation, images: ImageFolders, settings: SheetSettings) -> Figure:
    """The figure that `draw_sheet` makes a PNG of."""
    from matplotlib.figure import Figure  # which takes 26 MB: only where something is drawn

    if not 0 < len(evaluation.subjects) <= MOST_SUBJECTS:
        raise EvaluationError(f"A sheet is of 1 to {MOST_SUBJECTS} subjects, not of {len(evaluation.subjects)}.")
    ranks = [ranked(each, settings.sheet_score, settings.sheet_images) for each in evaluation.subjects]
    columns = 1 + max(len(best) for best, _ in ranks)
    rows = [1 + bool(worst) for _, worst in ranks]
    figure = Figure(figsize=(2.2 * columns + 0.4, 3.05 * sum(rows) + 0.45 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(_title(settings.sheet_score), fontsize=11, color=_TEXT)
    parts = figure.subfigures(len(rows), squeeze=False, height_ratios=rows)[:, 0]
    for part, scores, folder, rank in zip(parts, evaluation.subjects, images.subjects, ranks, strict=True):
        _draw_subject(part, columns, scores, folder, rank, settings.sheet_score)
    return figure


def ranked(scores: SubjectScores, score: ScoreName, count: int) -> tuple[list[int], list[int]]:
    """The places of the best images, best first, and of the worst, worst first; none is in both.

    Args:
        scores: of the subject.
        score: its name; of equal images, the earlier one is the better.
        count: of either, at most; of fewer images than twice as many, the first half, rounded up, are the best.
    """
    values = scores.score(score).values
    sign = 1 if score in DISTANCES else -1
    order = sorted(range(len(values)), key=lambda number: sign * values[number])
    best = min(count, (len(order) + 1) // 2)
    return order[:best], order[: max(best, len(order) - count) - 1 : -1]


def _title(score: ScoreName) -> str:
    return f"The best and the worst by {LABELS[score]}" + (", where less is better" if score in DISTANCES else "")


def _draw_subject(
    part: Any,
    columns: int,
    scores: SubjectScores,
    folder: SubjectFolder,
    rank: tuple[Sequence[int], Sequence[int]],
    score: ScoreName,
) -> None:
    """The rows of a subject, on its part of the figure."""
    count = len(scores.files)
    title = f"{scores.name}: {count} image{'s' if count > 1 else ''}"
    part.suptitle(title, fontsize=10, fontweight="bold", parse_math=False)
    shown = [(name, colour, places) for name, colour, places in _rows(rank) if places]
    grid = part.subplots(len(shown), columns, squeeze=False)
    for number, ((name, colour, places), line) in enumerate(zip(shown, grid, strict=True)):
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.set_visible(False)
        photograph = folder.real[min(number, len(folder.real) - 1)]
        _draw(line[0], photograph, _REAL, "photograph", [photograph.name])
        line[1].set_ylabel(name, fontsize=11, fontweight="bold", color=colour)
        for axes, place in zip(line[1:], places, strict=False):
            value = f"{LABELS[score]} {scores.score(score).values[place]:.3f}"
            _draw(axes, folder.generated[place], colour, value, [scores.files[place], f"“{scores.prompts[place]}”"])


def _rows(rank: tuple[Sequence[int], Sequence[int]]) -> list[tuple[str, str, Sequence[int]]]:
    return [("best", _BEST, rank[0]), ("worst", _WORST, rank[1])]


def _draw(axes: Any, path: Path, colour: str, head: str, lines: Sequence[str]) -> None:
    """A picture with a head above it and lines beneath."""
    axes.set_visible(True)
    image = upright_rgb(read_image(path), path)
    axes.imshow(ImageOps.pad(image, (_PIXELS, _PIXELS), Image.Resampling.LANCZOS, color="#f0f0f0"))
    axes.set_title(head, fontsize=9, color=colour)
    axes.set_xlabel("\n".join(map(_wrapped, lines)), fontsize=7.5, color=_TEXT, parse_math=False)
    for edge in axes.spines.values():
        edge.set(color=colour, linewidth=1.5)


def _wrapped(text: str) -> str:
    """At most three lines of a column's width."""
    return "\n".join(wrap(text, 34, max_lines=3, placeholder=" …”" if text.startswith("“") else " …"))
