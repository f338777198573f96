"""The sheet of the best and the worst: which images, where, and what stands beneath them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusekrona.errors import EvaluationError
from diffusekrona.evaluation import (
    Evaluation,
    ImageFolders,
    Score,
    SheetSettings,
    SubjectScores,
    draw_sheet,
    find_images,
)
from diffusekrona.evaluation import sheet as sheets
from diffusekrona.evaluation.evaluate import check_asked
from diffusekrona.evaluation.sheet import MOST_SUBJECTS, left_out, ranked, sheet_figure

COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta", "black"]


def scores_of(values: Sequence[float], name: str = "dog", **more: Score) -> SubjectScores:
    """Of images whose DINO is given, with CLIP-T the other way round and one CLIP-I for all."""
    files = tuple(f"{number}.png" for number in range(len(values)))
    prompts = tuple(f"a ${name}$ on sand, number {number}" for number in range(len(values)))
    same, reverse = Score((0.5,) * len(values)), Score(tuple(-value for value in values))
    return SubjectScores(name, 2, files, prompts, same, reverse, Score(tuple(values)), **more)


@pytest.mark.parametrize(
    ("count", "best", "worst"),
    [(1, [3], [1]), (2, [3, 0], [1, 4]), (3, [3, 0, 2], [1, 4]), (12, [3, 0, 2], [1, 4])],
)
def test_none_is_among_both_and_each_row_begins_with_its_extreme(count: int, best: list[int], worst: list[int]) -> None:
    assert ranked(scores_of([0.8, 0.1, 0.7, 0.9, 0.2]), "dino", count) == (best, worst)


@pytest.mark.parametrize(("images", "best", "worst"), [(1, [0], []), (2, [0], [1]), (3, [0, 1], [2])])
def test_of_few_images_the_better_half_comes_first(images: int, best: list[int], worst: list[int]) -> None:
    assert ranked(scores_of([0.9, 0.8, 0.7][:images]), "dino", 4) == (best, worst)


def test_the_score_is_chosen_and_of_a_distance_less_is_better() -> None:
    scores = scores_of([0.1, 0.2, 0.3, 0.4], lpips=Score((0.3, 0.1, 0.4, 0.2)))
    assert ranked(scores, "dino", 1) == ([3], [0])
    assert ranked(scores, "clip_t", 1) == ([0], [3])
    assert ranked(scores, "lpips", 2) == ([1, 3], [2, 0])


def test_of_equal_images_the_first_is_best_and_the_last_worst() -> None:
    assert ranked(scores_of([0.1, 0.2, 0.3, 0.4]), "clip_i", 2) == ([0, 1], [3, 2])


# What is drawn


def save_subject(folder: Path, name: str, images: int) -> None:
    """Two real images, grey and white, and generated ones of a colour each; all twice as wide as high."""
    for side, colours in (("real", ["grey", "white"]), ("out", COLOURS[:images])):
        (folder / side / name).mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (40, 20), colour).save(folder / side / name / f"{number}.png")
    (folder / "out" / name / "prompts.txt").write_text("a dog\n" * images)


@pytest.fixture
def folders(tmp_path: Path) -> ImageFolders:
    save_subject(tmp_path, "cat", 1)
    save_subject(tmp_path, "dog", 5)
    return find_images(tmp_path / "real", tmp_path / "out")


VALUES = [0.8, 0.1, 0.7, 0.9, 0.2]


def evaluation(*subjects: SubjectScores) -> Evaluation:
    return Evaluation({}, {}, (), subjects)


BOTH = evaluation(scores_of([0.5], "cat"), scores_of(VALUES))


def settings(score: str = "dino", count: int = 2) -> SheetSettings:
    return SheetSettings(sheet="sheet.png", sheet_score=score, sheet_images=count)


def drawn(part: Any) -> list[list[tuple[str, str, str, str]]]:
    """Of each row the colour, the head, the text beneath and the label of each picture."""
    rows: dict[float, list[tuple[str, str, str, str]]] = {}
    for axes in part.get_axes():
        if axes.get_visible():
            pixels = np.asarray(axes.get_images()[0].get_array())
            colour = tuple(int(value) for value in pixels[pixels.shape[0] // 2, pixels.shape[1] // 2])
            cell = (f"#{bytes(colour).hex()}", axes.get_title(), axes.get_xlabel(), axes.get_ylabel())
            rows.setdefault(axes.get_subplotspec().rowspan.start, []).append(cell)
    return [rows[key] for key in sorted(rows)]


def test_each_image_stands_in_its_row_with_its_name_score_and_prompt(folders: ImageFolders) -> None:
    figure = sheet_figure(BOTH, folders, settings())
    cat, dog = figure.subfigs
    assert drawn(cat) == [
        [
            ("#808080", "photograph", "0.png", ""),
            ("#ff0000", "DINO 0.500", "0.png\n“a $cat$ on sand, number 0”", "best"),
        ]
    ]
    assert drawn(dog) == [
        [
            ("#808080", "photograph", "0.png", ""),
            ("#ffff00", "DINO 0.900", "3.png\n“a $dog$ on sand, number 3”", "best"),
            ("#ff0000", "DINO 0.800", "0.png\n“a $dog$ on sand, number 0”", ""),
        ],
        [
            ("#ffffff", "photograph", "1.png", ""),
            ("#00ff00", "DINO 0.100", "1.png\n“a $dog$ on sand, number 1”", "worst"),
            ("#00ffff", "DINO 0.200", "4.png\n“a $dog$ on sand, number 4”", ""),
        ],
    ]
    assert [part.get_suptitle() for part in (cat, dog)] == ["cat: 1 image", "dog: 5 images"]
    assert figure.get_suptitle() == "The best and the worst by DINO"


def test_the_score_that_is_asked_for_is_shown(folders: ImageFolders) -> None:
    lpips = [scores_of([0.5], "cat", lpips=Score((0.3,))), scores_of(VALUES, lpips=Score((0.5, 0.1, 0.2, 0.3, 0.4)))]
    figure = sheet_figure(evaluation(*lpips), folders, settings("lpips", 1))
    (_, dog) = figure.subfigs
    assert [row[1][:2] for row in drawn(dog)] == [("#00ff00", "LPIPS 0.100"), ("#ff0000", "LPIPS 0.500")]
    assert figure.get_suptitle() == "The best and the worst by LPIPS, where less is better"


def test_the_whole_image_is_shown_upright_in_a_square(folders: ImageFolders) -> None:
    (cell,) = (axes for axes in sheet_figure(BOTH, folders, settings()).subfigs[0].get_axes() if axes.get_ylabel())
    pixels = np.asarray(cell.get_images()[0].get_array())
    assert pixels.shape[0] == pixels.shape[1]
    assert len(np.unique(pixels[len(pixels) // 2], axis=0)) == 1  # the image's whole width
    assert tuple(pixels[0, 0]) != (255, 0, 0)


def test_a_long_name_and_a_long_prompt_take_three_lines_each(tmp_path: Path) -> None:
    save_subject(tmp_path, "dog", 1)
    long = "word " * 60
    scores = SubjectScores("dog", 2, ("x" * 200,), (long,), Score((0.5,)), Score((0.5,)), Score((0.5,)))
    images = find_images(tmp_path / "real", tmp_path / "out")
    ((_, cell),) = drawn(sheet_figure(evaluation(scores), images, settings()).subfigs[0])
    lines = cell[2].split("\n")
    assert len(lines) == 6
    assert max(map(len, lines)) <= 36
    assert lines[2].endswith("…")
    assert lines[5].endswith("…”")


@pytest.mark.parametrize("where", ["name", "file", "prompt"])
def test_dollar_signs_are_no_formulas(folders: ImageFolders, where: str) -> None:
    """This one is broken, on which matplotlib would end."""
    given = {"name": "dog", "file": "0.png", "prompt": "a dog"} | {where: r"a $\frac$ b"}
    one = Score((0.5,))
    scores = SubjectScores(given["name"], 2, (given["file"],), (given["prompt"],), one, one, one)
    assert draw_sheet(evaluation(scores), ImageFolders(folders.subjects[:1], (), ()), settings())


def test_the_sheet_is_a_png_that_grows_with_what_is_on_it(folders: ImageFolders, tmp_path: Path) -> None:
    found = draw_sheet(BOTH, folders, settings())
    assert found.startswith(b"\x89PNG")
    few, many = (Image.open(io.BytesIO(draw_sheet(BOTH, folders, settings(count=count)))) for count in (1, 2))
    assert few.width < many.width < 1000
    assert few.height > few.width


# What is refused


def test_a_score_that_was_not_measured_is_refused(folders: ImageFolders) -> None:
    with pytest.raises(EvaluationError, match="lpips was not measured"):
        draw_sheet(BOTH, folders, settings("lpips"))


def test_a_sheet_needs_subjects_and_has_room_for_some(folders: ImageFolders) -> None:
    for subjects in ([], [scores_of([0.5])] * (MOST_SUBJECTS + 1)):
        with pytest.raises(EvaluationError, match=f"of 1 to {MOST_SUBJECTS} subjects, not of {len(subjects)}"):
            draw_sheet(evaluation(*subjects), folders, settings())


def test_the_most_subjects_are_not_too_high_for_matplotlib(tmp_path: Path) -> None:
    save_subject(tmp_path, "dog", 2)
    images = find_images(tmp_path / "real", tmp_path / "out")
    many = ImageFolders(images.subjects * MOST_SUBJECTS, (), ())
    figure = sheet_figure(evaluation(*[scores_of([0.5, 0.4])] * MOST_SUBJECTS), many, settings())
    assert len(figure.subfigs) == MOST_SUBJECTS
    assert figure.get_figheight() * 110 < 2**16


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sheet": "sheet.jpg"}, r"The sheet sheet\.jpg must end in \.png"),
        ({"sheet_score": "clip_i"}, r"sheet is missing; it must be such as sheet\.png"),
        (
            {"sheet": "a.png", "sheet_score": "drift"},
            "sheet_score must be one of clip_i, clip_t, dino, lpips, not 'drift'",
        ),
        ({"sheet": "a.png", "sheet_images": 0}, "sheet_images must be a whole number of at least 1 and of at most 12"),
        ({"sheet": "a.png", "sheet_images": 13}, "sheet_images must be .* not 13"),
        ({"sheet": "a.png", "sheet_image": 3}, "did you mean 'sheet_images'"),
    ],
)
def test_settings_that_are_wrong_are_told(given: dict[str, Any], said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        SheetSettings(**given)


def test_what_is_asked_for_is_checked_before_any_model_is_loaded(folders: ImageFolders) -> None:
    drift_alone = ImageFolders((), ((Path("a.png"), Path("a.png")),), ())
    check_asked(drift_alone, None, None)
    check_asked(folders, "weights", settings("lpips"))
    check_asked(folders, None, settings("dino"))
    with pytest.raises(EvaluationError, match=r"^lpips and sheet would have nothing to do: for drift alone"):
        check_asked(drift_alone, "weights", settings())
    with pytest.raises(EvaluationError, match=r"^sheet would have nothing to do"):
        check_asked(drift_alone, None, settings())
    with pytest.raises(EvaluationError, match="sheet_score is lpips, which is not measured; give lpips"):
        check_asked(folders, None, settings("lpips"))
    too_many = ImageFolders(folders.subjects * MOST_SUBJECTS, (), ())
    check_asked(too_many, None, None)
    with pytest.raises(EvaluationError, match=f"room for {MOST_SUBJECTS} subjects, not for {2 * MOST_SUBJECTS}"):
        check_asked(too_many, None, settings())


def test_without_matplotlib_a_line_says_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_out(Path("sheet.png")) is None
    monkeypatch.setattr(sheets, "find_spec", lambda name: None)
    line = left_out(Path("sheet.png"))
    assert line == (
        "The sheet sheet.png is left out, for want of matplotlib. To have it, pip install 'diffusekrona[train]'."
    )
