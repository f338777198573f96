"""Reading pictures of flat backgrounds."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from research.judges.scenes import COLOURS, obeyed, read_scene, shares

SUBJECTS = Path(__file__).parents[3] / "examples" / "subjects"
PAINT = (255, 0, 255)


def picture(colour, *boxes, pixels=64):
    """Discs in boxes (left, top, edge) on a named background."""
    image = Image.new("RGB", (pixels, pixels), COLOURS[colour])
    pen = ImageDraw.Draw(image)
    for left, top, edge in boxes:
        pen.ellipse((left, top, left + edge - 1, top + edge - 1), fill=PAINT)
    return image


@pytest.mark.parametrize("path", sorted(SUBJECTS.glob("*/*.png")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_subjects_own_pictures_are_as_their_captions_say(path):
    answers = obeyed(Image.open(path), path.with_suffix(".txt").read_text(encoding="utf-8"))
    assert answers == {"times": True, "background": True}


@given(st.sampled_from(list(COLOURS)), st.integers(0, 40), st.integers(0, 40), st.integers(12, 24))
def test_a_thing_is_found_where_it_is(colour, left, top, edge):
    scene = read_scene(picture(colour, (left, top, edge)))
    assert scene.colour == colour
    (box,) = scene.boxes
    assert np.allclose(np.array(box) * 64, (left, top, left + edge, top + edge), atol=1)


@given(st.sampled_from(list(COLOURS)), st.integers(-12, 12))
def test_a_background_may_be_a_little_off(colour, shift):
    pixels = np.clip(np.asarray(picture(colour, (20, 20, 24)), dtype=int) + shift, 0, 255)
    assert read_scene(Image.fromarray(pixels.astype(np.uint8))).colour == colour


@pytest.mark.parametrize(
    ("prompt", "right", "wrong"),
    [
        ("a fox at the left on a blue background", [(0, 20, 28)], [(34, 20, 28)]),
        ("a fox at the right on a blue background", [(34, 20, 28)], [(18, 18, 28)]),
        ("a fox at the top on a blue background", [(20, 0, 28)], [(20, 34, 28)]),
        ("a fox at the bottom on a blue background", [(20, 34, 28)], [(20, 2, 28)]),
        ("a small fox on a blue background", [(20, 20, 26)], [(8, 8, 44)]),
        ("a large fox on a blue background", [(4, 4, 54)], [(12, 12, 38)]),
        ("a fox twice on a blue background", [(2, 2, 24), (36, 36, 24)], [(2, 2, 24)]),
        ("a fox three times on a blue background", [(2, 2, 24), (36, 36, 24), (2, 36, 24)], [(2, 2, 24), (36, 36, 24)]),
        ("a fox on a blue background", [(8, 8, 40)], [(2, 2, 24), (36, 36, 24)]),
    ],
)
def test_what_is_asked_for_is_told_from_what_is_not(prompt, right, wrong):
    assert all(obeyed(picture("blue", *right), prompt).values())
    assert not all(obeyed(picture("blue", *wrong), prompt).values())
    assert obeyed(picture("red", *right), prompt)["background"] is False


def test_an_empty_picture_obeys_nothing_but_its_background():
    answers = obeyed(picture("pink"), "a small fox at the left on a pink background")
    assert answers == {"times": False, "background": True, "place": False, "size": False}


def test_specks_are_no_things_and_near_parts_are_one():
    image = picture("white", (10, 10, 20), (31, 10, 20))
    ImageDraw.Draw(image).rectangle((60, 60, 62, 62), fill=PAINT)
    assert len(read_scene(image).boxes) == 1


@pytest.mark.parametrize("box", [(-16, -16, 64), (16, -16, 64), (-16, 16, 64), (16, 16, 64)])
def test_a_thing_may_reach_over_the_edge(box):
    scene = read_scene(picture("white", box))
    assert scene.colour == "white"
    assert len(scene.boxes) == 1


def test_a_rough_background_is_no_thing():
    rough = np.random.default_rng(0).integers(-12, 13, (64, 64, 3))
    pixels = np.clip(np.asarray(picture("gray", (20, 20, 24)), dtype=int) + rough, 0, 255)
    assert read_scene(Image.fromarray(pixels.astype(np.uint8))).boxes == read_scene(picture("gray", (20, 20, 24))).boxes


def test_the_picture_may_be_of_any_size():
    small, large = picture("green", (2, 2, 24)), picture("green", (8, 8, 96), pixels=256)
    assert np.allclose(read_scene(small).boxes, read_scene(large).boxes, atol=0.02)


def test_shares_are_counted_by_kind_and_over_all():
    found = shares([{"times": True, "place": False}, {"times": True}, {"times": False}])
    assert found == {"times": 2 / 3, "place": 0.0, "obeyed": 2 / 4}
