"""Asking which of twelve drawings a picture shows: the encoder has seen none of the true ones."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image

from diffusekrona.errors import KronAError
from research.judges import seeing
from research.judges.scenes import COLOURS
from research.judges.seeing import ENCODER, on
from research.judges.spoiling import erased, from_image
from research.judges.which_drawing import WhichDrawing, things_of
from research.subjects import subject, subjects

NAMES = list(subjects())


@pytest.fixture(scope="module")
def judges() -> dict[str, WhichDrawing]:
    return {name: WhichDrawing(ENCODER, subject(name).twelve()) for name in NAMES}


def test_it_gives_thirteen_probabilities(judges: dict[str, WhichDrawing]) -> None:
    found = judges["car"].ask(on(from_image(subject("car").drawing()), 90, (10, 20), "pink"))
    assert len(found) == 13
    assert sum(found) == pytest.approx(1, abs=1e-5)
    assert min(found) >= 0


@pytest.mark.parametrize("name", NAMES)
def test_each_of_the_twelve_is_named_whatever_its_size_place_and_background(
    judges: dict[str, WhichDrawing], name: str
) -> None:
    rng = np.random.default_rng(NAMES.index(name))
    for number, drawing in enumerate(subject(name).twelve()):
        edge = (122, 48, 62, 80, 96)[number % 5]
        left, top = (int(n) for n in rng.integers(0, 129 - edge, 2))
        found = judges[name].ask(on(from_image(drawing), edge, (left, top), list(COLOURS)[number % 11]))
        assert found[number] > 0.9


def test_spoilt_drawings_fall_by_stated_amounts(judges: dict[str, WhichDrawing]) -> None:
    found: dict[str, list[float]] = {}
    for name in NAMES:
        for kind, images in seeing.shown(subject(name)).items():
            shown = images[:: len(seeing.VIEWS)] if kind == "other style" else images[:1]
            found.setdefault(kind, []).append(max(judges[name].ask(image)[0] for image in shown))
    means = {kind: mean(scores) for kind, scores in found.items()}
    assert min(found["true"] + found["small"]) > 0.95
    assert means["decoded"] > 0.85
    assert 0.35 < means["small, decoded"] < 0.6
    assert means["eyes moved"] < 0.5
    assert means["face erased"] < 0.35
    assert means["blob"] < 0.2
    assert means["blurred"] < 0.1
    assert max(found["other style"]) < 0.01
    assert max(found["background"]) == 0


def test_of_several_copies_the_best_counts(judges: dict[str, WhichDrawing]) -> None:
    cat = subject("cat")
    true = from_image(cat.drawing())
    wrong = on(erased(true, cat.eyes + cat.face), 60, (2, 6), "blue")
    right = on(true, 54, (70, 70), "blue")
    both = Image.fromarray(np.where(np.arange(128)[None, :, None] < 64, np.array(wrong), np.array(right)))
    assert judges["cat"].ask(wrong)[0] < 0.1
    assert judges["cat"].ask(both)[0] > 0.9


@pytest.mark.parametrize(("name", "colour"), [("cat", "orange"), ("car", "red"), ("elephant", "blue")])
def test_a_drawing_is_found_among_the_twelve_on_a_background_of_its_own_colour(
    judges: dict[str, WhichDrawing], name: str, colour: str
) -> None:
    assert judges[name].ask(on(from_image(subject(name).drawing()), 96, (20, 10), colour))[0] > 0.9


def test_nothing_is_none_of_the_twelve(judges: dict[str, WhichDrawing]) -> None:
    assert judges["bear"].ask(Image.new("RGB", (128, 128), "red")) == [0.0] * 12 + [1.0]


def test_specks_are_no_things_and_parts_over_a_small_gap_are_one() -> None:
    picture = torch.zeros(3, 128, 128)
    picture[0, 10:40, 10:30] = 1
    picture[0, 10:40, 33:50] = 1  # a gap of 3 pixels
    picture[1, 70:110, 60:120] = 1
    picture[2, 5:10, 100:110] = 1  # a speck
    assert things_of(picture) == [(60, 70, 120, 110), (10, 10, 50, 40)]


def test_a_folder_without_an_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(KronAError, match="holds no encoder"):
        WhichDrawing(tmp_path, [])


def test_another_model_is_refused() -> None:
    with pytest.raises(KronAError, match="emoji-classifier holds another model"):
        WhichDrawing(ENCODER.parent / "emoji-classifier", [])
