"""Laying the true drawing over pictures: real ones at every size, place and background, and spoilt ones."""

from __future__ import annotations

from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image

from diffusekrona.errors import KronAError
from research.judges import seeing
from research.judges.overlay import Overlay
from research.judges.scenes import COLOURS
from research.judges.spoiling import erased, from_image, on_colour, recoloured, to_image
from research.subjects import subject, subjects

NAMES = list(subjects())
EDGES = (48, 55, 62, 64, 80, 84, 98, 112, 114, 122)  # the ends of what scenes use, and some between


@pytest.fixture(scope="module")
def overlays() -> dict[str, Overlay]:
    return {name: Overlay(subject(name).drawing()) for name in NAMES}


def shares(colour: str) -> list[float]:
    return [level / 255 for level in COLOURS[colour]]


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_a_true_drawing_is_found_and_right_whatever_its_size_place_and_background(
    overlays: dict[str, Overlay], number: int
) -> None:
    rng, name = np.random.default_rng(number), NAMES[number]
    drawing = from_image(subject(name).drawing())
    for edge, colour in zip((EDGES[number], EDGES[-number]), list(COLOURS)[number:] + list(COLOURS), strict=False):
        left, top = (int(n) for n in rng.integers(0, 129 - edge, 2))
        laid = overlays[name].lay(on_colour(drawing, edge, (left, top), shares(colour)))
        assert laid.score > 0.95
        assert np.array(laid.box) * 128 == pytest.approx([left, top, left + edge, top + edge], abs=1.5)


@pytest.mark.slow
def test_spoilt_drawings_fall_by_stated_amounts(overlays: dict[str, Overlay]) -> None:
    found: dict[str, list[float]] = {}
    for name in NAMES:
        for kind, images in seeing.shown(subject(name)).items():
            shown = images[:: len(seeing.VIEWS)] if kind == "other style" else images[:1]
            found.setdefault(kind, []).append(max(overlays[name].lay(image).score for image in shown))
    means = {kind: mean(scores) for kind, scores in found.items()}
    assert min(found["true"] + found["small"]) > 0.95
    assert means["decoded"] > 0.8
    assert means["small, decoded"] > 0.7
    assert 0.15 < 1 - means["eyes moved"] < 0.35
    assert 0.4 < 1 - means["face erased"] < 0.6
    assert 0.45 < 1 - means["blurred"] < 0.65
    assert 0.6 < 1 - means["blob"] < 0.85
    assert means["other style"] < 0.2
    assert max(found["other style"]) < 0.4
    assert max(found["background"]) < 0.02
    order = ("true", "eyes moved", "face erased", "blurred", "blob", "other style", "background")
    assert [means[kind] for kind in order] == sorted((means[kind] for kind in order), reverse=True)
    for decoded, spoilt in zip(found["decoded"], found["blob"], strict=True):
        assert spoilt < decoded - 0.1


def test_of_several_copies_the_best_counts(overlays: dict[str, Overlay]) -> None:
    dog = subject("dog")
    true = from_image(dog.drawing())
    wrong = on_colour(erased(true, dog.eyes + dog.face), 54, (4, 6), shares("pink"))
    assert overlays["dog"].lay(wrong).score < 0.6
    right = on_colour(true, 54, (68, 70), shares("pink"))
    both = Image.fromarray(np.where(np.arange(128)[None, :, None] < 64, np.array(wrong), np.array(right)))
    laid = overlays["dog"].lay(both)
    assert laid.score > 0.95
    assert laid.box[0] * 128 == pytest.approx(68, abs=1)


@pytest.mark.parametrize(("wide", "high", "turn"), [(92, 92, 4.0), (98, 90, 0.0), (88, 93, -3.0)])
def test_a_stretch_and_a_turn_cost_little(overlays: dict[str, Overlay], wide: int, high: int, turn: float) -> None:
    bent = subject("lion").drawing().rotate(turn, Image.Resampling.BICUBIC).resize((wide, high))
    picture = Image.new("RGB", (128, 128), COLOURS["blue"])
    picture.paste(bent, (13, 21), bent)
    assert overlays["lion"].lay(picture).score > 0.9


def test_grain_and_a_slope_of_the_background_cost_little(overlays: dict[str, Overlay]) -> None:
    rng = np.random.default_rng(0)
    picture = np.asarray(on_colour(from_image(subject("bear").drawing()), 90, (20, 18), shares("yellow")), float)
    grainy = picture + rng.normal(0, 8, picture.shape) + np.linspace(-6, 6, 128)[:, None, None]
    assert overlays["bear"].lay(Image.fromarray(grainy.clip(0, 255).astype(np.uint8))).score > 0.9


@pytest.mark.parametrize("name", ["teapot", "car", "elephant"])
def test_wrong_colours_cost_much(overlays: dict[str, Overlay], name: str) -> None:
    swapped = recoloured(from_image(subject(name).drawing()), torch.eye(3)[[1, 2, 0]])
    laid = overlays[name].lay(on_colour(swapped, 96, (16, 16), shares("white")))
    assert laid.colours < 0.5
    assert laid.score < 0.3


@pytest.mark.parametrize("colour", ["orange", "black", "white", "purple"])
def test_the_background_changes_little_of_what_a_spoilt_drawing_gets(overlays: dict[str, Overlay], colour: str) -> None:
    robot = subject("robot")
    spoilt = erased(from_image(robot.drawing()), robot.eyes + robot.face)
    usual = overlays["robot"].lay(on_colour(spoilt, 96, (16, 16), shares("green"))).score
    assert overlays["robot"].lay(on_colour(spoilt, 96, (3, 27), shares(colour))).score == pytest.approx(usual, abs=0.06)


@pytest.mark.parametrize(("name", "colour"), [("cat", "orange"), ("teapot", "red"), ("elephant", "blue")])
def test_a_background_of_the_drawings_own_colour_is_not_the_drawing(
    overlays: dict[str, Overlay], name: str, colour: str
) -> None:
    assert overlays[name].lay(Image.new("RGB", (128, 128), COLOURS[colour])).score < 0.02


def test_a_picture_of_another_size_gets_the_same(overlays: dict[str, Overlay]) -> None:
    picture = on_colour(from_image(subject("cat").drawing()), 180, (40, 20), shares("gray"), side=256)
    laid = overlays["cat"].lay(picture)
    assert laid.score > 0.95
    assert laid.box == pytest.approx((40 / 256, 20 / 256, 220 / 256, 200 / 256), abs=0.01)


def test_a_drawing_without_an_outline_is_refused() -> None:
    with pytest.raises(KronAError, match="transparent around its outline"):
        Overlay(Image.new("RGB", (64, 64), "red"))
    with pytest.raises(KronAError, match="transparent around its outline"):
        Overlay(to_image(torch.zeros(4, 64, 64)))


def test_a_picture_that_is_not_square_is_refused(overlays: dict[str, Overlay]) -> None:
    with pytest.raises(KronAError, match=r"\(128, 96\)"):
        overlays["cat"].lay(Image.new("RGB", (128, 96)))
