"""What the errors of the small rooms tell users to do instead is done here, and works."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import save_file

from diffusekrona.bases.architectures import build, build_pipeline
from diffusekrona.bases.loading import load_base
from diffusekrona.errors import ConfigError
from diffusekrona.generation import generate_images
from diffusekrona.inputs.images import image_paths
from diffusekrona.schema import read_mapping
from diffusekrona.storage import read_safetensors
from diffusekrona.training.config import TrainingConfig
from diffusekrona.training.settings import Settings
from tests.pipelines import IMAGE_SIZE, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.refusals import choices, refusal


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# The base


@pytest.mark.parametrize(
    ("kind", "build"), [(StableDiffusionXLPipeline, tiny_sdxl_pipeline), (StableDiffusionPipeline, tiny_sd_pipeline)]
)
def test_a_checkpoint_in_one_file_is_converted_by_the_command_in_the_text(kind, build, tmp_path, monkeypatch):
    file, folder = tmp_path / "model.safetensors", tmp_path / "base"
    save_file({"model.diffusion_model.x": torch.zeros(1)}, file)
    text = refusal(load_base, file)
    command = re.search(r"(StableDiffusion\w+)(\.from_single_file\(file\)\.save_pretrained\(folder\))", text)
    assert kind.__name__ in text
    # Diffusers' own conversion needs a whole checkpoint, which is too large for a test.
    monkeypatch.setattr(kind, "from_single_file", lambda given: build() if given == file else None)
    eval(kind.__name__ + command[2], {kind.__name__: kind, "file": file, "folder": folder})
    assert isinstance(load_base(folder), kind)


@pytest.mark.parametrize("name", ["nobody/nothing", "folder"])
def test_a_base_that_is_nowhere_or_no_pipeline_is_a_folder_that_save_pretrained_wrote(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert "pipe.save_pretrained(folder)" in refusal(load_base, name)
    tiny_sd_pipeline().save_pretrained(name)
    load_base(name)


@pytest.mark.parametrize("make", [build, build_pipeline])
def test_known_models_are_named(make):
    for name in choices(refusal(make, "nothing"), "there are:"):
        make(name)


# Generation


@pytest.mark.parametrize(
    ("wrong", "said", "right"),
    [
        ({"steps": 0}, "steps must be at least 1", {"steps": 1}),
        ({"batch_size": 0}, "batch_size must be at least 1", {"batch_size": 1}),
        ({"seed": [1]}, "give one seed, or one for each prompt", {"seed": 1}),
        ({"seed": [1]}, "give one seed, or one for each prompt", {"seed": [1, 2]}),
        ({"seed": 2**64}, "from 0 to 2**64 - 1", {"seed": 2**64 - 1}),
        ({"height": IMAGE_SIZE}, "Give both height and width", {"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        ({"width": IMAGE_SIZE}, "or neither", {}),
    ],
)
def test_pictures_are_drawn_with_the_number_that_the_text_names(wrong, said, right):
    pipe, prompts = tiny_sd_pipeline(), ["a toy", "a dog"]
    assert said in refusal(generate_images, pipe, prompts, **{"steps": 1, **wrong})
    assert len(generate_images(pipe, prompts, **{"steps": 1, **right})) == 2


# Images


def test_a_folder_gets_an_image_of_a_kind_that_the_text_names(tmp_path):
    names = re.findall(r"\bname\.\w+", refusal(image_paths, tmp_path))
    assert len(names) == 2
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert len(image_paths(tmp_path)) == len(names)


# Settings


def test_settings_are_changed_as_the_text_says():
    config = TrainingConfig()
    with pytest.raises(AttributeError, match=r"\.replace\(seed=…\) gives another one") as caught:
        config.seed = 1
    other = eval("config" + re.search(r"\.replace\(seed=…\)", str(caught.value))[0].replace("…", "1"))
    assert (config.seed, other.seed) == (0, 1)


def test_a_file_of_settings_is_as_in_the_text(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("a1")
    line = re.search(r"`(.*)`", refusal(read_mapping, path, ConfigError))[1]
    path.write_text(line)
    assert read_mapping(path, ConfigError) == {"a1": 4}


def test_the_setting_that_the_text_guesses_is_one():
    values = {"base": "x", "instance_data_dir": "x", "output_dir": "x", "seeed": 1}
    del values["base"]
    values["pretrained_model_name_or_path"] = "x"
    near = re.search(r"did you mean '(\w+)'\?", refusal(Settings.of, values))[1]
    values[near] = values.pop("seeed")
    assert Settings.of(values).training.seed == 1


# Files


def test_numbers_of_a_strange_kind_are_saved_as_the_text_says(tmp_path):
    path = tmp_path / "dog.safetensors"
    header = json.dumps({"a": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    kinds = re.search(r"save it as (F16) or (F32)", refusal(read_safetensors, path)).groups()
    for dtype in ({"F16": torch.float16, "F32": torch.float32}[kind] for kind in kinds):
        save_file({"a": torch.zeros(2, 4, dtype=dtype)}, path)
        assert read_safetensors(path)[0]["a"].dtype == dtype
