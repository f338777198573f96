import numpy as np
import pytest
import torch
from PIL import Image

from diffusekrona.generation import generate_images
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


def test_each_image_is_of_the_prompt_and_of_a_seed_of_its_own(pipe, tmp_path):
    said = []
    count = draw_class_images(
        pipe, "a toy", tmp_path / "new" / "class", 3, batch_size=2, seed=5, on_image=lambda *how: said.append(how)
    )
    assert count == 3
    assert said == [(0, 3), (2, 3), (3, 3)]
    expected = generate_images(pipe, ["a toy"] * 3, [5, 6, 7], batch_size=2, steps=2)
    for number, image in enumerate(expected):
        with Image.open(tmp_path / "new" / "class" / f"class-{number:05d}.png") as file:
            assert np.array_equal(np.asarray(file), np.asarray(image))


def test_what_is_there_counts_and_is_not_drawn_again(pipe, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "own.JPG", "JPEG")
    for other in ("notes.md", "._own.jpg"):
        (tmp_path / other).write_text("not an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "class-00001.png")
    before = (tmp_path / "class-00001.png").read_bytes()
    said = []
    assert draw_class_images(pipe, "a toy", tmp_path, 4, on_image=lambda *how: said.append(how)) == 2
    assert said == [(2, 4), (4, 4)]
    drawn = [f"class-0000{number}.png" for number in range(3)]
    assert names(tmp_path) == ["._own.jpg", *drawn, "notes.md", "own.JPG"]
    assert (tmp_path / "class-00001.png").read_bytes() == before
    (drawn,) = generate_images(pipe, ["a toy"], [2], steps=2)
    with Image.open(tmp_path / "class-00002.png") as file:
        # It was drawn in a batch of two, which moves the last bits on some processors.
        assert np.abs(np.asarray(file, int) - np.asarray(drawn, int)).max() <= 1


def test_a_full_folder_is_left_alone(pipe, tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    said = []
    assert draw_class_images(pipe, "a toy", tmp_path, 2, on_image=lambda *how: said.append(how)) == 0
    assert (said, len(names(tmp_path))) == ([], 3)


def test_what_was_drawn_before_an_interruption_stays(pipe, tmp_path):
    def stop(done, count):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_class_images(pipe, "a toy", tmp_path, 4, batch_size=1, on_image=stop)
    assert names(tmp_path) == ["class-00000.png", "class-00001.png"]
    assert draw_class_images(pipe, "a toy", tmp_path, 4, batch_size=1) == 2


def test_the_pipeline_goes_to_the_device_only_if_something_is_drawn(pipe, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(pipe, "to", moved.append, raising=False)
    for _ in range(2):
        draw_class_images(pipe, "a toy", tmp_path, 1, device=torch.device("cpu"))
    assert moved == [torch.device("cpu")]
