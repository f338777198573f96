import numpy as np
import pytest
import torch
from PIL import Image

from diffusekrona.generation import generate_images
from diffusekrona.training.reports import Validation
from tests.pipelines import tiny_sd_pipeline

PROMPTS = ["a toy", "a toy on sand"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd_pipeline()


def validation(pipe, folder, prompts=PROMPTS):
    return Validation(pipe, prompts, folder, seed=3, steps=2, guidance_scale=4.0)


def test_pictures_are_those_of_the_prompts_seed_steps_and_guidance(pipe, tmp_path):
    drawn = validation(pipe, tmp_path).draw(100)
    expected = generate_images(pipe, PROMPTS, 3, steps=2, guidance_scale=4.0)
    for number, (image, other) in enumerate(zip(drawn, expected, strict=True)):
        assert np.array_equal(np.asarray(image), np.asarray(other))
        with Image.open(tmp_path / f"step-00000100-{number}.png") as file:
            assert np.array_equal(np.asarray(file), np.asarray(image))


def test_without_a_folder_nothing_is_kept(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(validation(pipe, None).draw(1)) == 2
    assert not list(tmp_path.iterdir())


def test_they_are_drawn_in_eval_mode_and_modes_come_back(pipe, tmp_path):
    modes = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    validation(pipe, tmp_path).draw(1)
    hook.remove()
    assert set(modes) == {False}
    assert (pipe.unet.training, pipe.unet.mid_block.training, pipe.vae.training) == (True, False, False)
    pipe.unet.eval()


def test_an_error_while_drawing_brings_modes_and_places_back(pipe, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no memory")

    pipe.unet.train()
    monkeypatch.setattr("diffusekrona.training.reports.generate_images", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        validation(pipe, tmp_path).draw(1)
    assert pipe.unet.training
    assert {parameter.device for parameter in pipe.unet.parameters()} == {torch.device("cpu")}
    assert not list(tmp_path.iterdir())
    pipe.unet.eval()


def test_the_sheet_has_a_row_for_each_step_also_of_before_and_a_column_for_each_prompt(pipe, tmp_path, monkeypatch):
    figures = []

    def keep(figure):
        figures.append(figure)
        return b""

    monkeypatch.setattr("diffusekrona.training.reports.figure_png", keep)
    for step in (100, 20):
        validation(pipe, tmp_path).draw(step)  # each as after a new start
    (tmp_path / "step-00000020-1.png").unlink()
    validation(pipe, tmp_path).draw(1000)
    axes = figures[-1].axes
    assert [one.get_ylabel() for one in axes] == ["step 20", "", "step 100", "", "step 1000", ""]
    assert [one.get_title() for one in axes] == [*PROMPTS, "", "", "", ""]
    assert [len(one.images) for one in axes] == [1, 0, 1, 1, 1, 1]
    shown = np.asarray(axes[3].images[0].get_array())
    with Image.open(tmp_path / "step-00000100-1.png") as file:
        assert np.array_equal(shown, np.asarray(file))
    assert axes[0].get_xticks().size == axes[0].get_yticks().size == 0
    assert figures[-1].get_size_inches().tolist() == pytest.approx([5.0, 7.1])


def test_the_sheet_is_a_png_whatever_the_prompt(pipe, tmp_path):
    validation(pipe, tmp_path, ["a $toy_ {"]).draw(1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
