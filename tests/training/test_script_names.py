"""Command lines and settings with the names of Diffusers' DreamBooth scripts."""

import pytest
from typer.testing import CliRunner

from diffusekrona.cli import app
from diffusekrona.training import TrainingConfig, TrainingConfigError
from diffusekrona.training.script_names import ANSWERS, MEANT
from diffusekrona.training.settings import NAMES, Settings

NEEDED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "images", "output_dir": "toy"}


def settings(**values):
    return Settings.of({**NEEDED, **values})


def test_names_that_mean_something_here_are_ours():
    assert settings(use_8bit_adam=True).training.optimizer == "adamw8bit"
    assert settings(use_8bit_adam=False).training.optimizer == "adamw"
    assert settings(resume_from_checkpoint="latest").output.resume
    assert not MEANT.keys() & NAMES.keys()
    assert not ANSWERS.keys() & (NAMES.keys() | MEANT.keys())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"resume_from_checkpoint": "checkpoint-500"}, "is 'latest', or left out.*give init_from"),
        ({"use_8bit_adam": True, "optimizer": "prodigy"}, "means optimizer: adamw8bit, but optimizer is prodigy"),
        ({"rank": 4}, "no setting 'rank'.* a1 and a2 set its size"),
    ],
    ids=str,
)
def test_names_that_do_not_are_answered_with_what_to_use(values, said):
    with pytest.raises(TrainingConfigError, match=said):
        settings(**values)


@pytest.mark.parametrize("flag", ["--rank", "--use_dora", "--validation-epochs"])
def test_a_flag_of_a_script_is_answered_by_the_command(flag):
    done = CliRunner().invoke(app, ["train", flag, "4"])
    words = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2
    assert ANSWERS[flag.lstrip("-").replace("-", "_")].split("`")[0].strip() in words


def test_a_repository_goes_into_a_flag_of_its_own():
    done = CliRunner().invoke(app, ["train", "--push_to_hub", "me/toy"])
    assert "name the repository with --hub-model-id" in " ".join(done.output.replace("│", " ").split())


def test_the_hidden_flags_are_read(tmp_path):
    line = ["train", "--pretrained_model_name_or_path", tmp_path / "gone", "--instance_data_dir", tmp_path]
    more = ["--output_dir", tmp_path / "toy", "--use_8bit_adam", "--resume_from_checkpoint", "latest", "--push_to_hub"]
    done = CliRunner().invoke(app, [*map(str, line), *map(str, more), "--seed", "3"])
    assert done.exit_code == 1
    assert "There is nothing to resume" in done.output
    assert "--use-8bit-adam" not in CliRunner().invoke(app, ["train", "--help"]).output


def test_epochs_are_steps_in_which_each_image_is_used_as_often():
    config = TrainingConfig(num_train_epochs=3, train_batch_size=2, gradient_accumulation_steps=2)
    assert config.in_steps(10, 1).max_train_steps == 8
    assert config.in_steps(10, 2).max_train_steps == 4
    assert TrainingConfig().in_steps(10, 1) == TrainingConfig()
    with pytest.raises(TrainingConfigError, match="both say when to stop"):
        TrainingConfig(num_train_epochs=3, max_train_steps=5)
