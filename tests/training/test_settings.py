from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffusekrona import KronAConfig
from diffusekrona.training import TrainingConfig, TrainingConfigError
from diffusekrona.training.settings import GROUPS, Settings, help_texts, read_settings, settings_text

NEEDED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "images", "output_dir": "toy"}
ALL = [one for group in GROUPS.values() for one in fields(group)]
WRITTEN = [one.name for one in ALL if one.name not in ("resume", "overwrite")]


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
    assert len({one.name for one in ALL}) == len(ALL)
    for group in GROUPS.values():
        texts = help_texts(group)
        assert list(texts) == [one.name for one in fields(group)]
        assert all(text.endswith(".") and len(text) > 8 for text in texts.values())


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
        "output_dir": name.map(lambda text: text.replace("/", "-").replace("~", "-")),
    }
    return {key: draw(values) for key, values in possible.items() if draw(st.booleans())}


@given(choices())
def test_settings_written_as_yaml_are_read_as_the_same_settings(tmp_path, chosen):
    found = settings(**chosen)
    path = written(tmp_path, "settings.yaml", settings_text(found))
    again = read_settings(path)
    assert list(again) == WRITTEN
    assert Settings.of(again) == found
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
    with pytest.raises(TrainingConfigError, match="Still to be given: pretrained_model_name_or_path, output_dir"):
        Settings.of({"instance_data_dir": "images"})
    needed = [one.name for one in ALL if one.default is MISSING and one.default_factory is MISSING]
    assert needed == ["pretrained_model_name_or_path", "output_dir"]


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
        ("a1", "four", "a1 must be a whole number, not 'four'"),
        ("a1", 4.0, "a1 must be a whole number"),
        ("repeats", True, "repeats must be a whole number, not True"),
        ("center_crop", "maybe", "center_crop must be true or false, not 'maybe'"),
        ("random_flip", 1, "random_flip must be true or false"),
        ("learning_rate", "fast", "learning_rate cannot be 'fast'"),
        ("alpha", [1], r"alpha cannot be \[1\]"),
        ("instance_prompt", 5, "instance_prompt must be a text, not 5"),
        ("instance_prompt", ["a toy"], "instance_prompt must be a text"),
        ("output_dir", 5, "output_dir cannot be 5"),
        ("dtype", "float8", "dtype must be one of float32, float16, bfloat16, not 'float8'"),
        ("on_bad_image", "ignore", "on_bad_image must be one of stop, skip"),
        ("optimizer", "sgd", "optimizer must be one of adamw, adamw8bit, prodigy"),
        ("init_a", {}, "init_a must be one of zeros, normal"),
        ("factors", {"to_k": 4}, "factors cannot be"),
        ("validation_prompt", [1], "validation_prompt must be a text or a list of texts"),
        ("num_class_images", 0, "num_class_images must be at least 1"),
        ("sample_batch_size", 0, "sample_batch_size must be at least 1"),
        ("validation_steps", 0, "validation_steps must be at least 1"),
        ("validation_inference_steps", 0, "validation_inference_steps must be at least 1"),
        ("alpha", True, "alpha must be a number, not True"),
        ("with_prior_preservation", True, "with_prior_preservation needs a class_prompt"),
        ("factors", ["to_k=4,8"], "factors cannot be"),
        ("factors", {"to_k": [4, 8, 16]}, "factors cannot be"),
        ("max_train_steps", 0, "max_train_steps must be a whole number of at least 1"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value, said):
    with pytest.raises(TrainingConfigError, match=f"^{said}"):
        settings(**{name: value})


@given(st.sampled_from([one.name for one in ALL]), st.none() | st.booleans() | st.integers() | st.floats() | st.text())
def test_any_value_of_any_setting_is_taken_or_refused_by_a_helpful_error(name, value):
    try:
        found = settings(**{name: value})
    except TrainingConfigError:
        return
    assert name not in WRITTEN or yaml.safe_load(settings_text(found))[name] == found.flat()[name]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "a1: [", "cannot be read"),
        ("a.toml", "a1 = ", "cannot be read"),
        ("a.yaml", "- a1", "should be a list of names and values"),
        ("a.yaml", "", "should be a list of names and values"),
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
        ({}, torch.float32),
        ({"mixed_precision": "bf16"}, torch.bfloat16),
        ({"mixed_precision": "fp16"}, torch.float16),
        ({"mixed_precision": "bf16", "dtype": "float32"}, torch.float32),
        ({"dtype": "float16"}, torch.float16),
    ],
)
def test_the_base_is_of_the_type_that_products_are_computed_in(values, dtype):
    assert settings(**values).base_dtype == dtype
