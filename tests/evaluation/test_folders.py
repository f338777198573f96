"""Which images belong together, and what is said where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusekrona.errors import DatasetError
from diffusekrona.evaluation import EvaluationError, find_images
from diffusekrona.evaluation.folders import without_words
from tests.evaluation.pictures import save


def generated(folder: Path, **prompts: str) -> Path:
    save(folder, **dict.fromkeys(prompts, 0))
    for name, prompt in prompts.items():
        (folder / f"{name}.txt").write_text(prompt)
    return folder


def test_a_folder_of_images_is_one_subject(tmp_path: Path) -> None:
    real = save(tmp_path / "dog", a=1, b=2)
    (real / "notes").mkdir()
    found = find_images(real, generated(tmp_path / "out", y="a sks dog", x="a sks dog on sand"), drop_words=["sks"])
    (subject,) = found.subjects
    assert subject.name == "dog"
    assert [path.name for path in subject.real] == ["a.png", "b.png"]
    assert [path.name for path in subject.generated] == ["x.png", "y.png"]
    assert subject.prompts == ("a dog on sand", "a dog")
    assert len(found) == 4


def test_subfolders_are_subjects_by_their_names(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save(tmp_path / "real" / name, a=1)
        generated(tmp_path / "out" / name, x=f"a {name}", y=f"a {name} on sand")
    (tmp_path / "out" / ".cache").mkdir()
    found = find_images(tmp_path / "real", tmp_path / "out")
    assert [(each.name, each.prompts[0]) for each in found.subjects] == [("cat", "a cat"), ("dog", "a dog")]
    assert len(found) == 6


def test_a_subject_on_one_side_only_is_named_with_the_folder_that_lacks_it(tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl"):
        save(tmp_path / "real" / name, a=1)
    generated(tmp_path / "out" / "cat", x="a cat")
    with pytest.raises(EvaluationError, match=r"out has no subfolder for: dog, owl \(it has cat\)"):
        find_images(tmp_path / "real", tmp_path / "out")
    with pytest.raises(EvaluationError, match=r"out has no subfolder for: dog, owl"):
        find_images(tmp_path / "out", tmp_path / "real")


def test_subfolders_on_one_side_only_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "real" / "dog", a=1)
    generated(tmp_path / "out", x="a dog")
    with pytest.raises(EvaluationError, match=r"out has no subfolders to go with the other folder's \(dog\)"):
        find_images(tmp_path / "real", tmp_path / "out")


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    real = save(tmp_path / "real", a=1)
    (tmp_path / "out").mkdir()
    with pytest.raises(DatasetError, match=r"no image folder .*nowhere"):
        find_images(real, tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"No images in .*out"):
        find_images(real, tmp_path / "out")
    save(tmp_path / "all" / "dog", a=1)
    (tmp_path / "out" / "dog").mkdir()
    with pytest.raises(DatasetError, match=r"No images in .*out.dog"):
        find_images(tmp_path / "all", tmp_path / "out")


def test_a_missing_prompt_is_named(tmp_path: Path) -> None:
    real = save(tmp_path / "real", a=1)
    out = save(generated(tmp_path / "out", x="a dog"), y=2)
    with pytest.raises(DatasetError, match=r"have no prompt: y\.png"):
        find_images(real, out)


def test_pairs_go_by_name(tmp_path: Path) -> None:
    base, adapted = save(tmp_path / "base", a=1, b=2), save(tmp_path / "adapted", b=3, a=4)
    found = find_images(base_images=base, adapted_images=adapted)
    assert found.pairs == ((base / "a.png", adapted / "a.png"), (base / "b.png", adapted / "b.png"))
    assert (found.subjects, len(found)) == ((), 4)


def test_an_image_without_its_partner_is_named_with_the_folder_that_lacks_it(tmp_path: Path) -> None:
    base, adapted = save(tmp_path / "base", a=1, b=2, c=3), save(tmp_path / "adapted", a=1)
    with pytest.raises(EvaluationError, match=r"adapted lacks 2 of the other folder's images, such as b\.png"):
        find_images(base_images=base, adapted_images=adapted)
    with pytest.raises(EvaluationError, match=r"adapted lacks 2"):
        find_images(base_images=adapted, adapted_images=base)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to measure"),
        ({"real": "x"}, "of real and generated images only one"),
        ({"real": "x", "generated": "x", "adapted_images": "x"}, "of base and adapted images only one"),
    ],
)
def test_half_of_a_pair_of_folders_is_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        find_images(**given)


@pytest.mark.parametrize(
    ("prompt", "words", "left"),
    [
        ("a photo of sks dog", ["sks"], "a photo of dog"),
        ("Sks dog, SKS", ["sks"], "dog,"),
        ("asks a skst", ["sks"], "asks a skst"),
        ("a <new1> dog", ["<new1>"], "a dog"),
        ("a sks dog", [], "a sks dog"),
        ("a b c", ["a", "c"], "b"),
    ],
)
def test_words_are_dropped_whole(prompt: str, words: list[str], left: str) -> None:
    assert without_words(prompt, words) == left


def test_a_prompt_of_dropped_words_alone_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no other words than sks"):
        without_words("sks  SKS", ["sks"])
