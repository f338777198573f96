import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusekrona.bases.loading import BaseModelError, config_in_float32, load_base
from diffusekrona.errors import KronAError
from tests.pipelines import tiny_sd_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_sd_pipeline().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_folder_is_loaded_in_the_type_asked_for(folder):
    pipe = load_base(folder, torch.bfloat16)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert pipe.unet.dtype == torch.bfloat16
    assert load_base(str(folder)).unet.dtype == torch.float32


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "./nothing", "no such model"])
def test_a_base_that_is_nowhere_says_where_it_was_looked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match="There is no base model") as error:
        load_base(name)
    assert isinstance(error.value, KronAError)
    assert name in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    could_be_an_id = name in ("nobody/nothing", "nothing")
    assert ("cannot be the id of a model" in str(error.value)) != could_be_an_id
    assert "hub" in str(error.value).lower()


def test_a_folder_that_is_no_pipeline_says_what_is_missing(tmp_path):
    with pytest.raises(BaseModelError, match=r"has no model_index\.json"):
        load_base(tmp_path)


def test_a_damaged_folder_is_named(folder, tmp_path):
    for path in folder.rglob("*"):
        if path.is_file() and "unet" not in path.parts:
            target = tmp_path / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    with pytest.raises(BaseModelError, match=str(tmp_path)):
        load_base(tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dtype": "float16", "hidden_size": 8}, {"dtype": "float32", "hidden_size": 8}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"hidden_size": 8}, {"dtype": "float32", "hidden_size": 8}),
    ],
)
def test_a_configuration_comes_to_say_float32(before, after, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert json.loads(config_in_float32(tmp_path / "config.json")) == after


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "float32"},
        {"torch_dtype": "float32"},
        {"_class_name": "UNet2DConditionModel"},
        {"dtype": "bfloat16", "quantization_config": {"quant_method": "bitsandbytes"}},
    ],
)
def test_a_configuration_that_needs_no_change_stays_to_the_letter(config, tmp_path):
    text = json.dumps(config, indent=7)
    (tmp_path / "config.json").write_text(text)
    assert config_in_float32(tmp_path / "config.json") == text


@pytest.mark.parametrize("text", ["{", "7", ""])
def test_a_configuration_that_is_none_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"config\.json is not a model's configuration"):
        config_in_float32(tmp_path / "config.json")
