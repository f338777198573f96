"""What is spoilt, and what stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from research.judges.spoiling import blob, blurred, erased, from_image, moved, on_colour, recoloured, resized, to_image
from research.subjects import subject

PARTS = subject("cat").eyes


@pytest.fixture(scope="module")
def cat() -> Tensor:
    return from_image(subject("cat").drawing())


def inside(edge: int = 128) -> Tensor:
    mask = torch.zeros(edge, edge, dtype=torch.bool)
    for left, top, right, bottom in PARTS:
        mask[round(top * edge) : round(bottom * edge), round(left * edge) : round(right * edge)] = True
    return mask


def test_a_drawing_survives_as_an_image(cat: Tensor) -> None:
    assert torch.allclose(from_image(to_image(cat)), cat, atol=1.5 / 255)


def test_erased_parts_look_as_what_is_around_them(cat: Tensor) -> None:
    spoilt = erased(cat, PARTS)
    assert torch.equal(spoilt[:, ~inside()], cat[:, ~inside()])
    fur = cat[:3, 50, 64]
    assert (cat[:3, inside()] - fur[:, None]).abs().max() > 0.5
    assert (spoilt[:3, inside()] - fur[:, None]).abs().max() < 0.1


def test_moved_parts_are_elsewhere_and_no_longer_where_they_were(cat: Tensor) -> None:
    spoilt = moved(cat, PARTS, [(0, -0.2), (0, -0.2)])
    dark = (cat[:3].sum(0) < 0.9) & inside()
    there = dark.roll(-round(0.2 * 128), 0)
    assert torch.allclose(spoilt[:3, there], cat[:3, dark], atol=0.1)
    assert spoilt[:3, dark & ~there].sum(0).min() > 1


@pytest.mark.parametrize("way", [(-9.0, 0.0), (9.0, 9.0)])
def test_moved_parts_stay_on_the_drawing(cat: Tensor, way: tuple[float, float]) -> None:
    spoilt = moved(cat, PARTS, [way, way])
    assert torch.equal(spoilt[3], cat[3])
    assert (spoilt[:3] <= spoilt[3:] + 1e-6).all()


def test_only_a_blur_changes_the_outline(cat: Tensor) -> None:
    mixed = torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    for spoilt in (erased(cat, PARTS), blob(cat), recoloured(cat, mixed)):
        assert torch.equal(spoilt[3], cat[3])
        assert (spoilt[:3] <= spoilt[3:] + 1e-6).all()
    assert not torch.allclose(blurred(cat, 12)[3], cat[3], atol=0.1)


def test_a_blur_leaves_so_many_pixels(cat: Tensor) -> None:
    assert torch.allclose(resized(blurred(cat, 16), 8), resized(cat, 8), atol=0.1)
    step = (blurred(cat, 12)[:, 1:] - blurred(cat, 12)[:, :-1]).abs().max()
    assert step < 12 / 128  # from nothing to all takes a pixel of the small one


def test_a_blob_has_the_drawings_mean_colour(cat: Tensor) -> None:
    assert torch.allclose(blob(cat).sum((1, 2)), cat.sum((1, 2)), rtol=1e-4)
    assert blob(cat)[:3, cat[3] == 1].std(1).max() < 1e-6


def test_a_picture_has_the_drawing_in_its_place_and_the_colour_elsewhere(cat: Tensor) -> None:
    picture = on_colour(cat, 64, (10, 20), (1, 0, 1), side=100)
    assert picture.size == (100, 100)
    assert picture.getpixel((5, 5)) == picture.getpixel((99, 99)) == (255, 0, 255)
    middle = (resized(cat, 64)[:3, 25, 32] * 255).round().tolist()
    assert list(picture.getpixel((10 + 32, 20 + 25))) == middle  # type: ignore[arg-type]
