"""The subjects' drawings, as they are in the repository."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageChops

from diffusekrona.errors import KronAError
from research.subjects import Subject, subject, subjects


@pytest.mark.parametrize("one", subjects().values(), ids=lambda one: one.name)
def test_a_subject_comes_with_twelve_different_drawings_its_own_first(one: Subject) -> None:
    twelve = one.twelve()
    assert len({image.tobytes() for image in twelve}) == 12
    assert {(image.mode, image.size) for image in twelve} == {("RGBA", (128, 128))}
    assert ImageChops.difference(twelve[0], one.drawing()).getbbox() is None
    assert 2 <= len(one.kin()) <= 3
    assert [image.tobytes() for image in twelve[1 : 1 + len(one.kin())]] == [image.tobytes() for image in one.kin()]


@pytest.mark.parametrize("one", subjects().values(), ids=lambda one: one.name)
def test_eyes_are_where_the_drawing_has_detail(one: Subject) -> None:
    pixels = np.asarray(one.drawing(), dtype=float)
    assert len(one.ways) == len(one.eyes)
    for left, top, right, bottom in one.eyes:
        seen = pixels[round(128 * top) : round(128 * bottom), round(128 * left) : round(128 * right)]
        assert seen[..., 3].mean() > 0.9 * 255
        assert seen[..., :3].std((0, 1)).max() > 15


def test_a_subject_that_is_not_there_is_named() -> None:
    with pytest.raises(KronAError, match="no subject 'unicorn'; there are bear, dog"):
        subject("unicorn")
