"""The judge against pictures whose content is known: the subject's pictures, flat colours, itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diffusekrona.errors import KronAError
from research.judges.classifier import Judge

ROOT = Path(__file__).parents[3]
BEARS = sorted((ROOT / "examples" / "toy-bear").glob("*.png"))


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(ROOT / "models" / "emoji-classifier")


@pytest.fixture(scope="module")
def bears() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in BEARS]


def test_it_names_the_backgrounds_that_the_pictures_are_called_after(judge: Judge, bears: list[Image.Image]) -> None:
    assert judge.name_backgrounds(bears) == [path.stem.split("-")[1] for path in BEARS]


def test_it_ranks_as_many_concepts_as_asked_for_and_none_twice(judge: Judge, bears: list[Image.Image]) -> None:
    for ranked in judge.name_concepts(bears, best=5):
        assert len(set(ranked)) == 5
        assert set(ranked) <= set(judge.concepts)


def test_it_does_not_know_the_subject(judge: Judge) -> None:
    assert not any("teddy" in name for name in judge.concepts)


def test_a_subjects_pictures_are_more_alike_than_flat_colours_are_to_them(
    judge: Judge, bears: list[Image.Image]
) -> None:
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("blue", "yellow", "gray")]
    assert judge.similarity(bears, bears) > judge.similarity(flat, bears)


def test_a_picture_is_not_compared_with_itself(judge: Judge, bears: list[Image.Image]) -> None:
    two = bears[:2]
    assert judge.similarity(two, two) == pytest.approx(judge.similarity(two[:1], two[1:]), abs=1e-5)
    assert judge.similarity(two[:1], [two[0].copy()]) == pytest.approx(1, abs=1e-5)


def test_a_folder_without_a_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(KronAError, match="holds no classifier"):
        Judge(tmp_path)
