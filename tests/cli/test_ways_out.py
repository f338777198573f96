"""What the commands' errors tell users to type instead is typed here, and works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusekrona import KronAConfig, inject_krona, save_krona
from diffusekrona.cli import app
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, one without cross-attention, an adapter of the first, and images."""
    folder = tmp_path_factory.mktemp("place")
    pipe = tiny_sd_pipeline()
    pipe.save_pretrained(folder / "base")
    tiny_sd3_pipeline().save_pretrained(folder / "flow")
    inject_krona(pipe, KronAConfig(init_weights=False))
    save_krona(pipe, folder / "dog.safetensors")
    (folder / "images").mkdir()
    Image.new("RGB", (40, 40), "red").save(folder / "images" / "red.png")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def called(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def refused(*arguments: object) -> str:
    return called(*arguments, code=1)


def flags(text: str) -> list[str]:
    return re.findall(r"--[a-z][\w-]*", text)


def test_a_prompt_is_given_by_each_flag_that_the_text_names(place, tmp_path):
    command = ["generate", "--base", place / "base", "--output", tmp_path / "out", "--steps", 1, "--device", "cpu"]
    text = refused(*command)
    (tmp_path / "prompts.txt").write_text("a toy\na dog\n")
    assert flags(text) == ["--prompt", "--prompts-file"]
    assert "with one per line" in text
    for flag, value, count in zip(flags(text), ("a toy", tmp_path / "prompts.txt"), (1, 2), strict=True):
        assert len(called(*command, flag, value).splitlines()) == count


def test_terms_are_given_beside_each_flag_that_the_text_names(place, tmp_path):
    command = ["convert", place / "dog.safetensors", tmp_path / "out", "--model", place / "base", "--num-terms", 1]
    first, *others = flags(refused(*command))
    assert (first, others) == ("--num-terms", ["--factors", "--budget"])
    for flag, value in zip(others, ("2,2", "0.9"), strict=True):
        assert "relative error" in called(*command, flag, value)


def test_one_pair_of_factors_is_written_as_in_the_text(place, tmp_path):
    command = ["convert", place / "dog.safetensors", tmp_path / "out", "--model", place / "base", "--factors"]
    example = re.search(r"such as ([\d,]+), not", refused(*command, "4x64"))[1]
    assert "relative error" in called(*command, example)


def test_factors_of_some_layers_are_written_as_in_the_text(place):
    command = ["params", "--model", place / "base", "--every-layer", "--factors"]
    example = re.search(r'such as "([^"]+)", not', refused(*command, "to_k"))[1]
    assert example.endswith("=2,32")
    assert called(*command, example) != called(*command[:-1])


def test_layers_that_do_not_fit_get_other_factors_or_are_not_targeted(place):
    command = ["params", "--model", place / "base", "--a1", 4, "--a2", 128]
    text = refused(*command)
    assert flags(text) == ["--factors", "--target-modules"]
    near = re.search(r"the nearest factors that fit are \((\d+), (\d+)\)", text).groups()
    called(*command, "--factors", f".*={','.join(near)}")
    called(*command, "--target-modules", r"mid_block.*attn1\.to_q")


def test_where_a_word_means_nothing_another_or_names_are_given(place):
    command = ["params", "--model", place / "flow", "--target-modules"]
    text = refused(*command, "cross-attention")
    called(*command, re.search(r'choose "(\w+)"', text)[1])
    assert "or name layers in target_modules" in text
    called(*command, r".*\.(to_q|to_k)")


def test_an_architecture_is_one_of_those_that_help_names_or_a_folder(place):
    text = refused("params", "--model", "sdxll")
    assert "There is no base model 'sdxll'" in text
    called("params", "--model", place / "base")


def test_a_name_of_a_base_that_fits_is_given(place, tmp_path):
    command = ["convert", place / "dog.safetensors", tmp_path / "out.safetensors", "--to", "lokr"]
    assert "the folder of its base model" in refused(*command[:3], "--factors", "2,2")
    called(*command, "--model", place / "base")


# Training


def training(place: Path, output: Path) -> list[object]:
    what = ["--base", place / "base", "--images", place / "images", "--output", output, "--prompt", "a sks toy"]
    return ["train", *what, "--max-train-steps", 1, "--target-modules", "mid_block.*to_q"]


def test_what_an_earlier_run_left_is_gone_on_from_replaced_or_left_alone(place, tmp_path):
    command = training(place, tmp_path / "toy")
    called(*command)
    text = refused(*command)
    for word in re.findall(r"\((\w+)\)", text):
        assert word in ("resume", "overwrite")
        called(*command, f"--{word}")
    assert "or choose another folder" in text  # as the first run did


def test_a_place_is_one_that_the_text_names(place, tmp_path):
    (tmp_path / "taken.txt").write_text("")
    text = refused(*training(place, tmp_path / "taken.txt"))
    assert "give a folder, or a file that ends in .safetensors" in text
    for output in ("folder", "file.safetensors"):
        called(*training(place, tmp_path / output))
    (tmp_path / "folder.safetensors").mkdir()
    assert "a file that ends in .safetensors was expected" in refused(*training(place, tmp_path / "folder.safetensors"))


def planning(place: Path, output: Path) -> list[object]:
    return [*training(place, output), "--plan"]


def test_images_come_from_one_of_the_places_that_the_text_names(place, tmp_path):
    command = [*planning(place, tmp_path / "toy"), "--dataset-dir", "nowhere"]
    names = re.search(r"Give either (\w+), .* or (\w+), .* or (\w+),", refused(*command)).groups()
    assert names == ("instance_data_dir", "dataset_dir", "dataset_name")
    called(*command[:-2])


def test_what_is_missing_is_given_by_a_flag_of_its_name(place, tmp_path):
    command = planning(place, tmp_path / "toy")
    without = [*command[:1], *command[3:]]
    name = re.search(r"(\w+) is missing", refused(*without))[1]
    called(*without, f"--{name.replace('_', '-')}", place / "base")


def test_the_setting_that_the_text_guesses_is_one(place, tmp_path):
    config = tmp_path / "toy.yaml"
    config.write_text("learning_rat: 1e-3")
    command = [*planning(place, tmp_path / "toy"), "--config", config]
    config.write_text(config.read_text().replace("learning_rat", re.search(r"mean '(\w+)'", refused(*command))[1]))
    called(*command)
    config.write_text("a1: 4\na1: 2\nprompt: a\ninstance_prompt: b")
    assert "Leave one of them out" in refused(*command)
    config.write_text("a1: 4\ninstance_prompt: b")
    called(*command)


# Evaluation


def test_folders_are_given_by_flags_of_the_names_in_the_text(place, tmp_path):
    for flag in ("--real", "--base-images"):
        text = refused("evaluate", flag, place / "images")
        kinds = re.search(r"the folders of (\w+) and (\w+) images", text).groups()
        help_text = called("evaluate", "--help")
        for kind in kinds:
            assert any(name in help_text for name in (f"--{kind}", f"--{kind}-images"))
