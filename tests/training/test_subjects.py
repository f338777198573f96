"""Which subjects a folder holds, and with which settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusekrona.errors import DatasetError
from diffusekrona.training import TrainingConfigError
from diffusekrona.training.subjects import find_subjects

SHARED = {"pretrained_model_name_or_path": "base", "instance_prompt": "a sks {name}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("dog", "cat", ".hidden"):
        (tmp_path / "subjects" / name).mkdir(parents=True)
    return tmp_path / "subjects"


def found(folder: Path, **values: Any) -> dict[str, Any]:
    subjects = find_subjects(folder, folder.parent / "out", {**SHARED, **values})
    return {subject.name: subject.settings for subject in subjects}


def test_each_folder_is_a_subject_and_its_name_stands_in_prompts(folder: Path) -> None:
    of = found(folder, validation_prompt=["{name} on the moon"], trigger_word="{name}1")
    assert list(of) == ["cat", "dog"]
    assert of["dog"].data.instance_prompt == "a sks dog"
    assert of["dog"].data.instance_data_dir == folder / "dog"
    assert of["dog"].data.trigger_word == "dog1"
    assert of["cat"].output.output_dir == folder.parent / "out" / "cat"
    assert of["cat"].output.validation_prompt == ["cat on the moon"]


def test_a_subjects_own_settings_win(folder: Path) -> None:
    (folder / "dog" / "settings.toml").write_text('prompt = "a zwx {name}"\na1 = 2\n', encoding="utf-8")
    of = found(folder, a1=8)
    assert (of["dog"].adapter.a1, of["cat"].adapter.a1) == (2, 8)
    assert of["dog"].data.instance_prompt == "a zwx dog"


@pytest.mark.parametrize("name", ["instance_data_dir", "dataset_dir", "dataset_name", "output_dir"])
def test_pictures_and_places_are_given_by_the_folders_alone(folder: Path, name: str) -> None:
    with pytest.raises(TrainingConfigError, match=f"{name} is not a setting of many subjects"):
        found(folder, **{name: "elsewhere"})
    (folder / "cat" / "settings.yaml").write_text(f"{name}: elsewhere\n", encoding="utf-8")
    with pytest.raises(TrainingConfigError, match=f"gives {name}"):
        found(folder)


def test_two_files_of_settings_are_told(folder: Path) -> None:
    for name in ("settings.yaml", "settings.toml"):
        (folder / "cat" / name).write_text("", encoding="utf-8")
    with pytest.raises(TrainingConfigError, match=r"both settings\.yaml and settings\.toml"):
        found(folder)


def test_a_wrong_setting_is_told_with_its_subject(folder: Path) -> None:
    (folder / "cat" / "settings.yaml").write_text("learning_rat: 1\n", encoding="utf-8")
    with pytest.raises(TrainingConfigError, match=r"settings of cat: .*did you mean 'learning_rate'"):
        found(folder)


def test_what_is_no_subject_is_told(folder: Path, tmp_path: Path) -> None:
    (folder / "loose.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"loose\.png"):
        found(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="is empty"):
        found(tmp_path / "empty")
    with pytest.raises(DatasetError, match="is no folder"):
        found(tmp_path / "nowhere")
