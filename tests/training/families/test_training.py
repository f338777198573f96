"""An adapter of each family: trained, saved, loaded in a fresh pipeline, drawn with, merged, and taken elsewhere."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open

from diffusekrona import KronAConfig, load_krona, merge_krona, save_krona
from diffusekrona.generation import generate_images
from diffusekrona.training import ImagePlan, TrainingConfig, prepare_images, train_dreambooth
from diffusekrona.training.batches import Batches
from diffusekrona.training.families import family_of
from tests.pipelines import FAMILIES, IMAGE_SIZE
from tests.training.runs import pictures

CONFIG = TrainingConfig(max_train_steps=40, learning_rate=1e-2)
NOISES = 8
PROMPT = "a sks toy"


def picture():
    return prepare_images(pictures(1), PROMPT, ImagePlan(IMAGE_SIZE))


@torch.no_grad()
def loss(pipe):
    """On the picture, over the same noise and levels in every call."""
    source = Batches("fixed", pipe, family_of(pipe), picture(), CONFIG, Accelerator(cpu=True))
    return sum(float(source.loss(number)) for number in range(NOISES)) / NOISES


def drawn(pipe):
    image, *_ = generate_images(pipe, [PROMPT], 3, steps=2, height=IMAGE_SIZE, width=IMAGE_SIZE)
    return np.asarray(image, dtype=np.int16)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:It is not known whether:UserWarning")
@pytest.mark.filterwarnings("ignore:Diffusers by itself refuses:UserWarning")
def test_an_adapter_is_learnt_and_goes_everywhere(name, tmp_path):
    build, program = FAMILIES[name].build, FAMILIES[name].program
    pipe, fresh = build(), build()
    before, plain = loss(pipe), drawn(pipe)
    train_dreambooth(pipe, picture(), PROMPT, CONFIG, KronAConfig(a1=4, a2=8))
    assert loss(pipe) < 0.97 * before
    save_krona(pipe, tmp_path / "toy")
    load_krona(fresh, tmp_path / "toy")
    assert loss(fresh) == pytest.approx(loss(pipe), rel=1e-5)
    picture_of_it = drawn(fresh)
    assert np.abs(picture_of_it - plain).max() > 0
    assert np.abs(picture_of_it - drawn(pipe)).max() <= 1
    merge_krona(fresh)
    assert np.abs(drawn(fresh) - picture_of_it).max() <= 1
    elsewhere = tmp_path / f"toy-{program}.safetensors"
    save_krona(pipe, elsewhere, format=program)
    with safe_open(elsewhere, "pt") as file:
        assert len([key for key in file.keys() if key.endswith(".lokr_w1")])  # noqa: SIM118
    again = build()
    load_krona(again, elsewhere)
    assert loss(again) == pytest.approx(loss(pipe), rel=1e-4)
