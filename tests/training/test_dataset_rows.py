"""Datasets by their names, offline: folders in the forms that `load_dataset` reads, and names that are of none."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusekrona.training import DatasetError, ImagePlan, TrainingConfigError
from diffusekrona.training.data import load_named_dataset
from diffusekrona.training.settings import Settings, read_settings, settings_text

datasets = pytest.importorskip("datasets")

PLAN = ImagePlan(32)
RED, BLUE = (255, 0, 0), (0, 0, 255)
NEEDED = {"pretrained_model_name_or_path": "base", "output_dir": "toy"}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, an empty cache, and a current folder of nothing but one picture."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "current").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "current" / "a.png")
    monkeypatch.chdir(tmp_path / "current")


def rows(*colours, texts=("a red toy", "a blue toy"), **names):
    """A dataset of pictures of one colour each, 40 x 30 pixels, and their texts."""
    found = []
    for colour in colours:
        content = io.BytesIO()
        Image.new("RGB", (40, 30), colour).save(content, "PNG")
        found.append({"bytes": content.getvalue(), "path": None})
    columns = {names.get("image", "image"): found, names.get("text", "text"): list(texts[: len(found)])}
    return datasets.Dataset.from_dict(columns).cast_column(names.get("image", "image"), datasets.Image())


def parquet(folder, split="train", **names):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows(RED, BLUE, **names).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def image_folder(folder):
    """Pictures in a folder for each split, with a table of their texts."""
    for split, colours in {"train": (RED, BLUE), "test": (BLUE,)}.items():
        (folder / split).mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (40, 30), colour).save(folder / split / f"{number}.png")
        lines = [f"{number}.png,a {'red' if colour == RED else 'blue'} toy" for number, colour in enumerate(colours)]
        (folder / split / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    return folder


def configured(folder):
    """Two configurations, of which the second one is the default."""
    parquet(folder / "plain")
    parquet(folder / "other", text="said")
    listed = "".join(
        f"- config_name: {name}\n  data_files: {name}/data/*.parquet\n{'  default: true' * (name == 'other')}\n"
        for name in ("plain", "other")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    return folder


@pytest.mark.parametrize("form", [parquet, image_folder])
def test_a_folder_that_load_dataset_reads_gives_its_training_split(form, tmp_path):
    found = load_named_dataset(str(form(tmp_path / "toys")), None, None, PLAN)
    assert [image.prompt for image in found] == ["a red toy", "a blue toy"]
    assert [tuple(np.array(image.image)[16, 16]) for image in found] == [RED, BLUE]
    assert [image.original_size for image in found] == [(30, 40)] * 2
    assert found[1].source.endswith("toys, row 1")


def test_columns_can_have_other_names_and_one_prompt_can_replace_the_captions(tmp_path):
    name = str(parquet(tmp_path / "toys", image="picture", text="said"))
    columns = {"image_column": "picture", "caption_column": "said"}
    assert load_named_dataset(name, None, None, PLAN, **columns)[0].prompt == "a red toy"
    assert load_named_dataset(name, None, "a toy", PLAN, "picture")[0].prompt == "a toy"
    with pytest.raises(DatasetError, match=r"toys has no column 'image'; there are: picture, said\."):
        load_named_dataset(name, None, None, PLAN)


def test_a_folder_that_was_changed_is_read_anew(tmp_path):
    folder = image_folder(tmp_path / "toys")
    load_named_dataset(str(folder), None, None, PLAN)
    (folder / "train" / "metadata.csv").write_text("file_name,text\n0.png,a new toy\n1.png,another\n")
    assert [image.prompt for image in load_named_dataset(str(folder), None, None, PLAN)] == ["a new toy", "another"]


def test_a_configuration_is_one_of_those_that_there_are(tmp_path):
    name = str(configured(tmp_path / "toys"))
    assert load_named_dataset(name, "plain", None, PLAN)[0].prompt == "a red toy"
    assert load_named_dataset(name, None, None, PLAN, caption_column="said")[0].prompt == "a red toy"
    with pytest.raises(DatasetError, match=r"dataset_config_name 'third': .*'third' not found.*'plain', 'other'"):
        load_named_dataset(name, "third", None, PLAN)


def test_a_dataset_without_a_training_split_says_which_there_are(tmp_path):
    parquet(tmp_path / "toys", "test")
    with pytest.raises(DatasetError, match=r"toys has no split 'train'; its splits are: validation, test\."):
        load_named_dataset(str(parquet(tmp_path / "toys", "validation")), None, None, PLAN)


@pytest.mark.parametrize("name", ["me/nowhere", "nowhere", "me/no/where", "me/no where"])
def test_a_name_of_nothing_is_told_with_both_places_where_it_was_looked_for(name, tmp_path):
    with pytest.raises(DatasetError) as error:
        load_named_dataset(name, None, None, PLAN)
    assert f"dataset_name '{name}': there is no such folder (looked for {tmp_path / 'current' / name})" in str(
        error.value
    )
    assert "the hub gave no such dataset" in str(error.value)


@pytest.mark.parametrize("name", ["imagefolder", "parquet", "", "/ "])
def test_the_name_of_a_reader_is_not_the_current_folder(name):
    with pytest.raises(DatasetError, match="which names no dataset"):
        load_named_dataset(name, None, "a toy", PLAN)


def test_a_folder_that_is_called_like_a_reader_is_that_folder(tmp_path, monkeypatch):
    parquet(tmp_path / "imagefolder")
    monkeypatch.chdir(tmp_path)
    assert len(load_named_dataset("imagefolder", None, None, PLAN)) == 2


@pytest.mark.parametrize("splits", [False, True])
def test_what_save_to_disk_wrote_is_sent_to_its_own_setting(splits, tmp_path):
    found = rows(RED)
    (datasets.DatasetDict({"train": found}) if splits else found).save_to_disk(tmp_path / "saved")
    with pytest.raises(DatasetError, match=r"saved is a dataset that save_to_disk wrote: give it as dataset_dir"):
        load_named_dataset(str(tmp_path / "saved"), None, None, PLAN)


@pytest.mark.parametrize("content", [None, b"no parquet"])
def test_a_folder_that_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / "bad").mkdir()
    if content is not None:
        (tmp_path / "bad" / "a.parquet").write_bytes(content)
    with pytest.raises(DatasetError, match=r"the folder .*bad cannot be read as a dataset: .+"):
        load_named_dataset(str(tmp_path / "bad"), None, None, PLAN)


# Settings


def test_a_configuration_needs_a_dataset_by_name():
    with pytest.raises(TrainingConfigError, match="dataset_config_name is given, but no dataset_name"):
        Settings.of({**NEEDED, "instance_data_dir": "images", "dataset_config_name": "plain"})


@pytest.mark.parametrize("other", ["instance_data_dir", "dataset_dir"])
def test_images_come_from_one_place(other):
    Settings.of({**NEEDED, "dataset_name": "me/toys"})
    with pytest.raises(TrainingConfigError, match=r"either instance_data_dir, .* dataset_dir, .* or dataset_name"):
        Settings.of({**NEEDED, "dataset_name": "me/toys", other: "images"})


def test_the_run_keeps_a_folders_place_and_an_id_as_it_is(tmp_path, monkeypatch):
    parquet(tmp_path / "toys")
    monkeypatch.chdir(tmp_path)
    for name, kept in {"toys": str(tmp_path / "toys"), "me/toys": "me/toys"}.items():
        (tmp_path / "settings.yaml").write_text(settings_text(Settings.of({**NEEDED, "dataset_name": name})))
        assert read_settings(tmp_path / "settings.yaml")["dataset_name"] == kept


def test_the_package_is_loaded_only_to_read_one():
    program = """
import sys
import diffusekrona.training.data
print("datasets" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
