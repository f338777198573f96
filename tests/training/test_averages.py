import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from diffusekrona import load_krona
from diffusekrona.generation import generate_images
from diffusekrona.training import TrainingInterrupted
from diffusekrona.training.run import run
from diffusekrona.training.settings import Settings
from tests.pipelines import tiny_sd_pipeline
from tests.training.runs import QUICK, SMALL, adapted, copies, pictures, same, train, trained


def test_an_interrupted_run_leaves_the_averages_as_a_finished_one_does(tmp_path):
    pipe, factors = adapted(**SMALL)
    each = []

    def stop_at_three(done):
        each.append(copies(factors))
        if done.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted) as stopped:
        train(pipe, factors, QUICK.replace(max_train_steps=9, ema_decay=0.9), stop_at_three, folder=tmp_path)
    assert stopped.value.step == 3
    for name, found in factors.items():
        average = each[0][name].double()
        for step, now in enumerate(each[1:], 1):
            keep = min(0.9, (1 + step) / (10 + step))
            average = keep * average + (1 - keep) * now[name]
        torch.testing.assert_close(found.double(), average, rtol=1e-5, atol=1e-7)
        if "krona_B" in name:
            assert not torch.equal(found, each[-1][name])


def test_an_observer_may_look_at_the_averages_and_changes_nothing():
    pipe, factors = adapted(**SMALL)
    config = QUICK.replace(max_train_steps=3, ema_decay=0.9)
    looked = []

    def draw_in_vain(done):
        with done.averaged():
            looked.append(copies(factors))
            raise RuntimeError("no memory")

    def look(done):
        before = copies(factors)
        with pytest.raises(RuntimeError, match="no memory"):
            draw_in_vain(done)
        assert same(factors, before)
        assert same(looked[-1], before) == (done.step == 1)  # the first average is the first step's

    losses = train(pipe, factors, config, look).losses
    assert same(looked[-1], factors)
    others, other_losses = trained(config)
    assert same(factors, others)
    assert losses == other_losses


def test_without_averages_an_observer_sees_the_parameters():
    pipe, factors = adapted(**SMALL)

    def look(done):
        before = copies(factors)
        with done.averaged():
            assert same(factors, before)

    train(pipe, factors, QUICK, look)


def test_validation_pictures_show_the_adapter_that_is_saved(tmp_path):
    tiny_sd_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    pictures(1)[0].save(tmp_path / "images" / "0.png")
    values = {
        "pretrained_model_name_or_path": str(tmp_path / "base"), "instance_data_dir": tmp_path / "images",
        "instance_prompt": "a sks toy", "output_dir": tmp_path / "toy", "max_train_steps": 3, "seed": 5,
        "learning_rate": 0.1, "ema_decay": 0.9, "validation_prompt": ["a sks toy"], "validation_inference_steps": 2,
        "validation_guidance_scale": 3.0,
    }  # fmt: skip
    run(Settings.of(values))
    pipe = tiny_sd_pipeline()
    load_krona(pipe, tmp_path / "toy")
    (expected,) = generate_images(pipe, ["a sks toy"], 5, steps=2, guidance_scale=3.0)
    with Image.open(tmp_path / "toy" / "run" / "validation" / "step-00000003-0.png") as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(expected))
