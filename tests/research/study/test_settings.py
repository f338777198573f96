"""Settings of studies: what is committed can be read, and what is wrong is told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from research.study.__main__ import app
from research.study.run import chosen_study, plan_study
from research.study.settings import StudySettings, StudySettingsError, Subject, read_study_settings
from research.study.studies import STUDIES

ROOT = Path(__file__).parents[3]
FULL_SIZE = sorted((ROOT / "studies" / "sdxl").glob("[tf]*.yaml"))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The layout that the full-size settings expect."""
    folder = tmp_path / "data" / "subjects"
    for name in ("backpack", "dog"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(folder / name / "0.jpg")
    (folder / "classes.csv").write_text("subject_name,class\nbackpack,backpack\ndog,dog\n")
    (folder / "prompts.txt").write_text("a {} on the beach\n\na {} in the snow\n")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_the_full_size_settings_say_what_they_would_measure(data, path):
    settings = read_study_settings(path)
    assert set(settings.subjects) == {"backpack", "dog"}
    assert settings.prompts == ("a {} on the beach", "a {} in the snow")
    (name,) = settings.studies
    planned = plan_study(chosen_study(name, settings), settings, data)
    assert int(planned["models to train"]) > 0
    assert int(planned["optimizer steps"].replace(",", "")) == 1000 * int(planned["models to train"])


@pytest.mark.parametrize("name", list(STUDIES))
def test_the_small_base_has_settings_for_every_study(monkeypatch, tmp_path, name):
    monkeypatch.chdir(ROOT)
    settings = read_study_settings(Path("studies/emoji.yaml"))
    planned = plan_study(chosen_study(name, settings), settings, tmp_path)
    assert int(planned["models to train"]) > 0


def test_a_table_with_one_rate_for_each_method_needs_no_search(data):
    settings = read_study_settings(ROOT / "studies" / "sdxl" / "table3.yaml")
    assert plan_study(chosen_study("methods", settings), settings, data)["models to train"] == "4"


def small(**changes):
    values = {
        "base": "b",
        "clip": "c",
        "dino": "d",
        "subjects": {"dog": {"images": "dogs", "kind": "dog"}},
        "prompts": ["a {}"],
        "other_prompts": ["a cat"],
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"promts": ["a {}"]}, "did you mean 'prompts'"),
        ({"base": None}, "lacks base"),
        ({"prompts": ["a dog"]}, "once"),
        ({"prompts": ["{} and {}"]}, "once"),
        ({"prompts": []}, "needs subjects, prompts"),
        ({"subjects": {"dog": {"images": "dogs"}}}, "its `kind`"),
        ({"held_back": ["cat"]}, "none of the subjects"),
        ({"training": {"steps": 3}}, "The study's training cannot be as it says. There is no setting 'steps'"),
        ({"training": {"max_train_steps": 0}}, "max_train_steps"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, changes, said):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(small(**changes)))
    with pytest.raises(ValueError, match=said):
        read_study_settings(tmp_path / "study.yaml")


@pytest.mark.parametrize("text", ["- a list\n", "a: [", None])
def test_what_is_no_list_of_settings_is_told(tmp_path, text):
    if text is not None:
        (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(StudySettingsError, match=r"study\.yaml"):
        read_study_settings(tmp_path / "study.yaml")


def test_settings_may_extend_others(tmp_path):
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(small(guidance_scale=3.0)))
    (tmp_path / "one.yaml").write_text("extends: common.yaml\nguidance_scale: 5.0\n")
    assert read_study_settings(tmp_path / "one.yaml").guidance_scale == 5.0
    assert read_study_settings(tmp_path / "one.yaml").base == "b"


def test_a_folder_of_subjects_needs_their_classes(data):
    (data / "cat").mkdir()
    with pytest.raises(StudySettingsError, match="no class word of cat"):
        read_study_settings(FULL_SIZE[0])


def test_missing_pictures_are_named_before_anything_is_loaded(settings, tmp_path):
    wrong = replace(settings, subjects={"dog": Subject(str(tmp_path / "dogs"), "dog")}, held_back=())
    with pytest.raises(StudySettingsError, match="pictures of dog"):
        plan_study(chosen_study("steps", wrong), wrong, tmp_path)


def test_what_measurements_share_is_all_but_what_cannot_change_them(settings):
    def of(**changes: object) -> dict[str, object]:
        return replace(settings, **changes).shared()

    assert of() == of(generation_batch_size=3) == of(held_back=()) == of(studies={"steps": {}})
    for changed in ({"base": "x"}, {"prompts": ("b {}",)}, {"training": {}}, {"image_seed": 3}, {"identifier": "zwx"}):
        assert of(**changed) != of()
    assert isinstance(settings, StudySettings)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_the_command_measures_and_writes_a_page(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    values = {name: value for name, value in settings.shared().items() if name != "subjects"}
    subjects = {name: vars(subject) for name, subject in settings.subjects.items()}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({**listed, "subjects": subjects}))
    given = ("steps", "--config", str(tmp_path / "one.yaml"), "--output", str(tmp_path / "out"))
    planned = command(*given, "--plan")
    assert planned.exit_code == 0, planned.output
    assert "models to train   3" in planned.output
    assert not (tmp_path / "out").exists()
    (tmp_path / "one.yaml").write_text(
        yaml.safe_dump({**listed, "subjects": subjects, "studies": {"steps": {"steps": [1], "subjects": 1}}})
    )
    done = command(*given, "--quick", "--workers", "1")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "quick" / "steps.md").is_file()
    assert "1/1" in done.output


def test_the_command_says_what_is_wrong(tmp_path):
    done = command("steps", "--config", str(tmp_path / "nowhere.yaml"))
    assert done.exit_code == 1
    assert "nowhere.yaml cannot be read" in " ".join(done.output.split())
