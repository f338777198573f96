import importlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffusekrona import KronAConfig
from diffusekrona.training import TrainingConfig, TrainingConfigError
from diffusekrona.training.settings import GROUPS, NAMES, SHORT_NAMES, Settings, read_settings, settings_text
from diffusekrona.tuner.fields import FIELDS

NEEDED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "images", "output_dir": "toy"}
WRITTEN = [name for name in NAMES if name not in ("resume", "overwrite")]


def settings(**values):
    return Settings.of({**NEEDED, **values})


def written(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_not_given_is_as_in_the_libraries_own_configs():
    found = settings()
    assert found.training == TrainingConfig()
    assert found.adapter.config().to_dict() == KronAConfig().to_dict()
    assert found.data.instance_data_dir == Path("images")


def test_each_setting_has_one_place_and_a_text():
    assert len(NAMES) == sum(len(group.fields) for group in GROUPS)
    assert not SHORT_NAMES.keys() & NAMES.keys()
    for name, field in NAMES.items():
        assert re.fullmatch(r"[A-Z].+\.", field.description or "", re.DOTALL), name


def test_the_adapters_choices_are_those_of_its_config():
    declared = {one.name: one for one in fields(KronAConfig)}
    adapter = next(group for group in GROUPS if group.name == "adapter")
    assert adapter.fields.keys() == FIELDS.keys() | {"factors"}
    for name, (default, text) in FIELDS.items():
        assert (declared[name].default, declared[name].metadata["help"]) == (default, text)
        assert (adapter.fields[name].default, adapter.fields[name].description) == (default, text)


def test_a_page_can_be_built_from_the_schema():
    schema = Settings.model_json_schema()
    assert {name: one["title"] for name, one in schema["properties"].items()} == {
        "data": "Base model and data",
        "images": "Images",
        "adapter": "Adapter",
        "training": "Training",
        "prior": "Prior preservation",
        "output": "Output",
    }
    found = {}
    for group in schema["properties"].values():
        model = schema["$defs"][group["$ref"].rpartition("/")[2]]
        assert model["additionalProperties"] is False
        found |= model["properties"]
    assert list(found) == list(NAMES)
    assert all(one["title"] and one["description"].endswith(".") for one in found.values())
    assert found["max_train_steps"] | {"description": ""} == {
        "default": 1000, "description": "", "minimum": 1, "title": "Max Train Steps", "type": "integer",
    }  # fmt: skip
    assert found["cache"]["enum"] == ["memory", "disk", "none"]
    assert (found["dropout"]["minimum"], found["dropout"]["exclusiveMaximum"]) == (0, 1)
    assert found["output_dir"]["format"] == "path"
    assert found["output_dir"]["short"] == "output"


def test_settings_are_read_and_checked_without_torch():
    program = """
import sys
sys.argv = ["diffusekrona"]
from diffusekrona.training.settings import Settings
Settings.of({"pretrained_model_name_or_path": "base", "instance_data_dir": "images", "output_dir": "toy"})
from diffusekrona.training import TrainingConfig
print(*(name for name in ("torch", "peft", "accelerate", "transformers", "diffusers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("\n", "")


@pytest.mark.parametrize("package", ["diffusekrona", "diffusekrona.training", "diffusekrona.evaluation"])
def test_public_names_are_those_of_the_list_and_no_others(package):
    found = {}
    exec(f"from {package} import *", found)
    module = importlib.import_module(package)
    assert found.keys() - {"__builtins__"} == set(module.__all__)
    assert all(found[name] == getattr(module, name) for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@st.composite
def choices(draw):
    """Settings of every type, some of them left out."""
    name = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1)
    possible = {
        "a1": st.integers(1, 64),
        "alpha": st.floats(0.01, 10),
        "b_rank": st.none() | st.integers(1, 9),
        "factors": st.dictionaries(st.sampled_from(["to_k", ".*to_(q|v)", "a=b"]), st.tuples(st.just(4), st.just(8))),
        "adam_epsilon": st.floats(1e-12, 1e-3),
        "instance_prompt": name,
        "snr_gamma": st.none() | st.floats(1, 20),
        "max_train_steps": st.integers(1, 9999),
        "random_flip": st.booleans(),
        "optimizer": st.sampled_from(["adamw", "prodigy"]),
        "validation_prompt": st.lists(name, max_size=2),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "single": st.booleans(),
    }
    return {key: draw(values) for key, values in possible.items() if draw(st.booleans())}


@given(choices())
def test_settings_written_as_yaml_are_read_as_the_same_settings_wherever_the_run_went(tmp_path, chosen):
    name = f"toy{'.v2.safetensors' if chosen.pop('single', False) else ''}"
    here, there = (
        {"output_dir": tmp_path / place / name, "instance_data_dir": tmp_path} for place in ("here", "there")
    )
    found = settings(**chosen, **here)
    folder = settings(**chosen, **there).output.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    again = read_settings(written(folder, "settings.yaml", settings_text(found)))
    assert list(again) == WRITTEN
    assert Settings.of(again) == settings(**chosen, **there)
    assert settings_text(Settings.of(again)) == settings_text(found)


def test_settings_are_written_in_the_letters_of_the_prompt():
    assert "instance_prompt: ein grünes Männchen\n" in settings_text(settings(instance_prompt="ein grünes Männchen"))


def test_yaml_and_toml_say_the_same(tmp_path):
    as_yaml = """
        pretrained_model_name_or_path: base
        instance-data-dir: ~/images
        output_dir: toy
        learning-rate: 1e-4
        max_train_steps: 20
        random_flip: true
        snr_gamma: null
        factors: {to_k: [2, 8], "mid_.*": [4, 4]}
    """
    as_toml = """
        pretrained_model_name_or_path = "base"
        instance-data-dir = "~/images"
        output_dir = "toy"
        learning-rate = 1e-4
        max_train_steps = 20
        random_flip = true
        [factors]
        to_k = [2, 8]
        "mid_.*" = [4, 4]
    """
    paths = written(tmp_path, "a.yaml", as_yaml), written(tmp_path, "a.toml", as_toml)
    first, second = (Settings.of(read_settings(path)) for path in paths)
    assert first == second
    assert first.training == TrainingConfig(max_train_steps=20, learning_rate=1e-4, random_flip=True)
    assert first.adapter.config().factor_pattern == {"to_k": (2, 8), "mid_.*": (4, 4)}
    assert first.data.instance_data_dir == Path.home() / "images"


@pytest.mark.parametrize(
    ("name", "near"),
    [("learning_rat", "learning_rate"), ("max_steps", "max_train_steps"), ("targets", "target_modules")],
)
def test_an_unknown_name_is_refused_and_the_nearest_one_named(name, near):
    with pytest.raises(TrainingConfigError, match=rf"There is no setting '{name}'; did you mean '{near}'\?"):
        settings(**{name: 1})


def test_a_name_like_no_other_is_refused_too():
    with pytest.raises(TrainingConfigError, match=r"There is no setting 'qqqqqq'\.$"):
        settings(qqqqqq=1)


def test_files_may_use_the_shorter_names_of_flags(tmp_path):
    path = written(tmp_path, "a.yaml", "base: base\nimages: images\noutput: toy\nprompt: a toy\n")
    assert Settings.of(read_settings(path)) == settings(instance_prompt="a toy")


def test_one_validation_prompt_is_a_list_of_one():
    assert settings(validation_prompt="a toy").output.validation_prompt == ["a toy"]


def test_all_that_is_missing_is_named():
    with pytest.raises(TrainingConfigError) as error:
        Settings.of({"instance_data_dir": "images"})
    assert str(error.value) == (
        "pretrained_model_name_or_path is missing; it must be a text. output_dir is missing; it must be a path."
    )
    assert [name for name, one in NAMES.items() if one.is_required()] == [
        "pretrained_model_name_or_path",
        "output_dir",
    ]


def test_wrong_values_of_several_groups_are_told_together():
    with pytest.raises(TrainingConfigError) as error:
        settings(a1=True, seed=-1, output_dir=5)
    assert str(error.value) == (
        "a1 must be a whole number of at least 1, not True. seed must be a whole number of at least 0, not -1. "
        "output_dir must be a path, not 5."
    )


def test_unknown_names_are_told_together():
    with pytest.raises(TrainingConfigError, match=r"'repeat'; did you mean 'repeats'\? There is .* mean 'seed'\?$"):
        settings(repeat=1, sed=2)


def test_a_setting_that_a_file_gives_twice_is_refused(tmp_path):
    path = written(tmp_path, "a.yaml", "instance_prompt: a toy\nprompt: a dog\n")
    with pytest.raises(TrainingConfigError, match=r"a\.yaml give instance_prompt twice, once as prompt"):
        read_settings(path)


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "+1.0e-4", "1.e-4", ".1e-3", "0.0001"])
def test_numbers_in_yaml_are_those_of_yaml_1_2(tmp_path, number):
    assert read_settings(written(tmp_path, "a.yaml", f"learning_rate: {number}")) == {"learning_rate": 1e-4}


@pytest.mark.parametrize("text", ["1e", "e4", "1e-4x", "'1e-4'", "1.2.3"])
def test_other_texts_in_yaml_stay_texts(tmp_path, text):
    assert read_settings(written(tmp_path, "a.yaml", f"prompt: {text}")) == {"instance_prompt": text.strip("'")}


@pytest.mark.parametrize("values", [{"instance_data_dir": None}, {"dataset_dir": "dataset"}])
def test_images_come_from_a_folder_or_a_dataset_and_not_from_both_or_neither(values):
    with pytest.raises(TrainingConfigError, match=r"either instance_data_dir, .*, or dataset_dir"):
        settings(**values)


@pytest.mark.parametrize("prompt", [None, "", " "])
def test_class_images_need_a_prompt(prompt):
    with pytest.raises(TrainingConfigError, match="with_prior_preservation needs a class_prompt"):
        settings(with_prior_preservation=True, class_prompt=prompt)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("a1", "four", "a1 must be a whole number of at least 1, not 'four'"),
        ("a1", "4", "a1 must be a whole number of at least 1, not '4'"),
        ("a2", 0, "a2 must be a whole number of at least 1, not 0"),
        ("a1", 4.0, "a1 must be a whole number"),
        ("repeats", True, "repeats must be a whole number of at least 1, not True"),
        ("center_crop", "maybe", "center_crop must be true or false, not 'maybe'"),
        ("random_flip", 1, "random_flip must be true or false"),
        ("learning_rate", "fast", "learning_rate must be a finite number above 0, not 'fast'"),
        ("alpha", [1], r"alpha must be a finite number, not \[1\]"),
        ("instance_prompt", 5, "instance_prompt must be a text, not 5"),
        ("instance_prompt", ["a toy"], "instance_prompt must be a text"),
        ("output_dir", 5, "output_dir must be a path, not 5"),
        ("output_dir", "~nobody-of-this-name/toy", "output_dir must be a path, not '~nobody"),
        ("dtype", "float8", "dtype must be one of float32, float16, bfloat16, not 'float8'"),
        ("on_bad_image", "ignore", "on_bad_image must be one of stop, skip"),
        ("optimizer", 1, "optimizer must be a text, not 1"),
        ("optimizer_args", [1], r"optimizer_args must be such as {'weight_decay': 0\.01}, not \[1\]"),
        ("init_a", {}, "init_a must be one of zeros, normal"),
        ("factors", {"to_k": 4}, r"factors must be such as {'to_k\|to_v': \[2, 32\]}, not {'to_k': 4}\.$"),
        ("factors", {"to_k": [4, 0]}, "factors must be such as"),
        ("dropout", 1.0, r"dropout must be a finite number of at least 0 and below 1, not 1\.0"),
        ("also", "lora", "also must be 'lokr', not 'lora'"),
        ("validation_prompt", [1], "validation_prompt must be a text or a list of texts"),
        ("num_class_images", 0, "num_class_images must be a whole number of at least 1"),
        ("sample_batch_size", 0, "sample_batch_size must be a whole number of at least 1"),
        ("validation_steps", 0, "validation_steps must be a whole number of at least 1"),
        ("validation_inference_steps", 0, "validation_inference_steps must be a whole number of at least 1"),
        ("alpha", True, "alpha must be a finite number, not True"),
        ("with_prior_preservation", True, "with_prior_preservation needs a class_prompt"),
        ("factors", ["to_k=4,8"], "factors must be such as"),
        ("factors", {"to_k": [4, 8, 16]}, "factors must be such as"),
        ("max_train_steps", 0, "max_train_steps must be a whole number of at least 1"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value, said):
    with pytest.raises(TrainingConfigError, match=f"^{said}"):
        settings(**{name: value})


@given(st.sampled_from(list(NAMES)), st.none() | st.booleans() | st.integers() | st.floats() | st.text())
def test_any_value_of_any_setting_is_taken_or_refused_by_a_helpful_error(name, value):
    try:
        found = settings(**{name: value})
    except TrainingConfigError:
        return
    is_place = name.endswith("_dir") or name in (
        "pretrained_model_name_or_path",
        "init_from",
    )  # which are written in full
    assert is_place or name not in WRITTEN or yaml.safe_load(settings_text(found))[name] == found.flat()[name]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "a1: [", "cannot be read"),
        ("a.toml", "a1 = ", "cannot be read"),
        ("a.yaml", "- a1", "should be names and values"),
        ("a.yaml", "", "should be names and values"),
    ],
)
def test_a_file_that_is_no_list_of_settings_is_refused_by_name(tmp_path, name, text, said):
    with pytest.raises(TrainingConfigError, match=rf"The settings .*{name} {said}"):
        read_settings(written(tmp_path, name, text))


def test_a_missing_file_is_named():
    with pytest.raises(TrainingConfigError, match=r"nowhere\.yaml cannot be read: .*No such file"):
        read_settings(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("output", "folder"),
    [("toy", "toy/run"), ("toy-v1.5", "toy-v1.5/run"), ("out/toy.safetensors", "out/toy/run")],
)
def test_checkpoints_go_beside_the_adapter(output, folder):
    assert settings(output_dir=output).output.run_folder == Path(folder)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({}, "float32"),
        ({"mixed_precision": "bf16"}, "bfloat16"),
        ({"mixed_precision": "fp16"}, "float16"),
        ({"mixed_precision": "bf16", "dtype": "float32"}, "float32"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_the_base_is_of_the_type_that_products_are_computed_in(values, dtype):
    assert settings(**values).base_dtype == dtype
