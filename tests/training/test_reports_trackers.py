import os
import re
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusekrona.training import TrainingConfigError, TrainingStep
from diffusekrona.training.reports import Trackers


def step(number):
    return TrainingStep(number, 9, 0.5 / number, 0.4, 1e-3 * number, 2.0, 7.0 + number)


def written(folder):
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_has_loss_rate_speed_and_pictures(tmp_path):
    trackers = Trackers(tmp_path / "board", {}, "tensorboard")
    for number in (1, 2):
        trackers.step(step(number))
    pictures = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    trackers.pictures(2, ["a", "b"], pictures)
    trackers.close()
    board = written(tmp_path / "board")
    for name, expected in (("loss", [0.5, 0.25]), ("learning_rate", [1e-3, 2e-3]), ("images_per_second", [8, 9])):
        events = board.Scalars(f"train/{name}")
        assert [event.step for event in events] == [1, 2]
        np.testing.assert_allclose([event.value for event in events], expected, rtol=1e-6)
    for number in (0, 1):
        (event,) = board.Images(f"validation/{number}")
        assert (event.step, event.width, event.height) == (2, 6, 4)


def test_steps_after_the_one_that_a_run_goes_on_from_are_replaced(tmp_path):
    for resumed_at, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = Trackers(tmp_path, {}, "tensorboard", resumed_at)
        for number in steps:
            trackers.step(step(number))
        trackers.close()
    assert [event.step for event in written(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4]


def test_weights_and_biases_that_is_not_installed_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainingConfigError, match="'wandb' needs the package: pip install wandb"):
        Trackers(tmp_path, {}, "wandb")


def test_weights_and_biases_has_the_same_and_the_settings_beside_tensorboards_files(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    trackers = Trackers(tmp_path / "run" / "board", {"a1": 4, "instance_prompt": "a sks toy"}, "wandb")
    run = wandb.run
    for number in (1, 2):
        trackers.step(step(number))
    trackers.pictures(2, ["a toy", "a toy on sand"], [Image.new("RGB", (6, 4), "red")] * 2)
    assert run.project == "diffusekrona"
    assert dict(run.config) == {"a1": 4, "instance_prompt": "a sks toy"}
    trackers.step(step(3))  # which ends the step before
    summary = dict(run.summary)
    trackers.close()
    assert wandb.run is None
    assert (summary["loss"], summary["learning_rate"], summary["images_per_second"]) == (0.25, 2e-3, 9)
    assert summary["validation"]["captions"] == ["a toy", "a toy on sand"]
    assert len(written(tmp_path / "run" / "board").Scalars("train/loss")) == 3
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(re.fullmatch(r"run/wandb/offline-run-[^/]+/run-\w+\.wandb", name) for name in files)
    assert any(re.fullmatch(r"run/wandb/.*/media/images/validation_2_\w+\.png", name) for name in files)
    assert os.listdir(tmp_path) == ["run"]
