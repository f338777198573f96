import numpy as np
import pytest
import torch
from PIL import Image

from diffusekrona.generation import generate_images
from diffusekrona.training import ImagePlan, load_folder
from diffusekrona.training.prior import draw_class_images
from tests.pipelines import tiny_sd_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd_pipeline()


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Two denoising steps in place of 50, by the same function."""
    monkeypatch.setattr(
        "diffusekrona.training.prior.generate_images",
        lambda *arguments, **options: generate_images(*arguments, **options, steps=2),
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def images(folder):
    return {path.name: np.asarray(Image.open(path), int) for path in sorted(folder.glob("class-*.png"))}


def test_each_image_is_of_the_prompt_and_of_a_seed_of_its_own(pipe, tmp_path):
    said = []
    folder = tmp_path / "new" / "class"
    used = draw_class_images(pipe, "a toy", folder, 3, batch_size=2, seed=5, on_image=lambda *how: said.append(how))
    assert used == names(folder)
    assert [name[-10:] for name in used] == ["-00000.png", "-00001.png", "-00002.png"]
    assert said == [(0, 3), (2, 3), (3, 3)]
    expected = generate_images(pipe, ["a toy"] * 3, [5, 6, 7], batch_size=2, steps=2)
    for image, file in zip(expected, images(folder).values(), strict=True):
        assert np.array_equal(file, np.asarray(image))


def test_what_is_there_counts_and_is_not_drawn_again(pipe, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "own.JPG", "JPEG")
    for other in ("notes.md", "._own.jpg"):
        (tmp_path / other).write_text("not an image")
    first = draw_class_images(pipe, "a toy", tmp_path, 2)
    before = images(tmp_path)
    said = []
    used = draw_class_images(pipe, "a toy", tmp_path, 4, on_image=lambda *how: said.append(how))
    assert said == [(2, 4), (4, 4)]
    assert used[:2] == first == ["own.JPG", next(iter(before))]
    assert names(tmp_path) == sorted(["._own.jpg", "notes.md", *used])
    assert all(np.array_equal(images(tmp_path)[name], image) for name, image in before.items())


@pytest.mark.parametrize("change", ["prompt", "seed", "base"])
def test_images_of_another_prompt_seed_or_base_are_not_used_again_and_stay(pipe, tmp_path, change, caplog):
    first = draw_class_images(pipe, "a toy", tmp_path, 2)
    before = images(tmp_path)
    other = tiny_sd_pipeline(seed=1) if change == "base" else pipe
    prompt, seed = "a car" if change == "prompt" else "a toy", 7 if change == "seed" else 0
    second = draw_class_images(other, prompt, tmp_path, 2, seed=seed)
    assert not set(first) & set(second)
    assert sorted(first + second) == names(tmp_path)
    assert all(np.array_equal(images(tmp_path)[name], image) for name, image in before.items())
    assert draw_class_images(pipe, "a toy", tmp_path, 2) == first
    with caplog.at_level("WARNING"):
        assert len(load_folder(tmp_path, "a toy", ImagePlan(32), only=first)) == 2
    assert all(f"{name} (not asked for)" in caplog.text for name in second)


def test_a_full_folder_is_left_alone_and_no_more_are_used_than_asked_for(pipe, tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    said = []
    assert draw_class_images(pipe, "a toy", tmp_path, 2, on_image=lambda *how: said.append(how)) == ["0.png", "1.png"]
    assert (said, len(names(tmp_path))) == ([], 3)


def test_what_was_drawn_before_an_interruption_stays(pipe, tmp_path):
    def stop(done, count):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_class_images(pipe, "a toy", tmp_path, 4, batch_size=1, on_image=stop)
    before = images(tmp_path)
    assert len(before) == 2
    assert len(draw_class_images(pipe, "a toy", tmp_path, 4, batch_size=1)) == 4
    assert all(np.array_equal(images(tmp_path)[name], image) for name, image in before.items())


def test_the_pipeline_goes_to_the_device_only_if_something_is_drawn(pipe, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(pipe, "to", moved.append, raising=False)
    for _ in range(2):
        draw_class_images(pipe, "a toy", tmp_path, 1, device=torch.device("cpu"))
    assert moved == [torch.device("cpu")]
