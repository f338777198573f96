from functools import wraps

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, FluxPipeline, HeunDiscreteScheduler

from diffusekrona.errors import KronAError
from diffusekrona.generation import generate_images, generated
from tests.pipelines import (
    IMAGE_SIZE,
    tiny_flux_pipeline,
    tiny_sana_pipeline,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_wan_pipeline,
)

PROMPTS = ["a toy", "a dog", "a cup"]
SEEDS = [3, 4, 5]


def generate(pipe, prompts=PROMPTS, seed=0, **options):
    return [np.array(image, dtype=int) for image in generate_images(pipe, prompts, seed, steps=2, **options)]


def nearly_equal(first, second):
    """Equal but for rounding; a batch's size changes the last bits of matrix products."""
    return np.abs(first - second).max() <= 1


@pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline])
def test_an_image_depends_on_its_prompt_and_seed_and_not_on_the_batch(build):
    pipe = build()
    # A scheduler that draws noise in every step shows if that, too, comes from the image's own generator.
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    alone = [generate(pipe, [prompt], seed)[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    for batch_size in (1, 2, 3):
        together = generate(pipe, PROMPTS, SEEDS, batch_size=batch_size)
        assert all(nearly_equal(*pair) for pair in zip(alone, together, strict=True))
    assert not nearly_equal(alone[0], alone[1])


def test_one_seed_serves_all_prompts():
    pipe = tiny_sd_pipeline()
    same, other = generate(pipe, ["a toy", "a toy"], 7, batch_size=2), generate(pipe, ["a toy"], 8)
    assert nearly_equal(same[0], same[1])
    assert not nearly_equal(same[0], other[0])


def test_options_reach_the_pipeline():
    pipe = tiny_sd_pipeline()
    plain = generate(pipe, ["a toy"])[0]
    assert plain.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert generate(pipe, ["a toy"], height=48, width=40)[0].shape == (48, 40, 3)
    assert not nearly_equal(plain, generate(pipe, ["a toy"], guidance_scale=1.0)[0])
    assert not nearly_equal(plain, generate(pipe, ["a toy"], negative_prompt="a dog")[0])


@pytest.mark.parametrize("scheduler", [None, HeunDiscreteScheduler])
def test_progress_counts_every_step_of_every_batch_and_ends_at_the_total(scheduler):
    pipe, seen = tiny_sd_pipeline(), []
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    generate(pipe, batch_size=2, on_step=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {4}
    assert {done for done, _ in seen} == {1, 2, 3, 4}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_no_prompts_give_no_images():
    assert generate(tiny_sd_pipeline(), []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1, 2]}, "3 prompts but 2 seeds"),
        ({"seed": -1}, "from 0 to 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"height": 16}, "both height and width"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(KronAError, match=message):
        generate(tiny_sd_pipeline(), **options)


def test_zero_steps_are_refused():
    with pytest.raises(KronAError, match="steps must be at least 1"):
        generate_images(tiny_sd_pipeline(), ["a toy"], steps=0)


def test_each_image_is_there_before_the_next_is_drawn():
    drawn = []
    pipe = tiny_sd_pipeline()
    images = generated(pipe, PROMPTS, steps=2, on_step=lambda done, total: drawn.append(done))
    next(images)
    assert drawn == [1, 2]
    assert len(list(images)) == 2


def test_a_mistake_is_told_before_anything_is_drawn():
    with pytest.raises(KronAError, match="steps must be at least 1"):
        generated(tiny_sd_pipeline(), PROMPTS, steps=0)


def half_overflowing(pipe):
    """An autoencoder whose first layer gives infinities in float16, as SDXL's does."""
    pipe.to(torch.float16)
    plain = pipe.vae.post_quant_conv.forward
    pipe.vae.post_quant_conv.forward = lambda x: plain(x) * (float("inf") if x.dtype == torch.float16 else 1)
    return pipe


def test_an_autoencoder_that_overflows_in_half_precision_runs_again_in_float32():
    expected = generate(tiny_sd_pipeline().to(torch.float16), ["a toy"])[0]
    pipe = half_overflowing(tiny_sd_pipeline())
    with pytest.warns(UserWarning, match="not finite in float16.*run again in float32"):
        found = generate(pipe, ["a toy"])[0]
    assert np.abs(found - expected).max() <= 4
    assert pipe.vae.dtype == torch.float16
    assert "decode" not in vars(pipe.vae)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_a_picture_that_stays_without_numbers_is_told():
    pipe = tiny_sd_pipeline()
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="black in parts. Load the base in bfloat16 or float32"):
        generate(pipe, ["a toy"])


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_guidance_is_the_pipelines_own_where_none_is_asked_for(guidance, monkeypatch):
    pipe = tiny_flux_pipeline()
    told = {}
    call = type(pipe).__call__
    monkeypatch.setattr(
        FluxPipeline, "__call__", wraps(call)(lambda self, **how: told.update(how) or call(self, **how))
    )
    generate_images(pipe, ["a toy"], steps=1, height=32, width=32, guidance_scale=guidance)
    assert told.get("guidance_scale") is None
    assert told.get("true_cfg_scale") == guidance
    assert told.get("negative_prompt") == (None if guidance is None else [" "])


def test_a_pipeline_of_videos_draws_one_frame():
    image = generate(tiny_wan_pipeline(), ["a toy"], height=48, width=32)[0]
    assert image.shape == (48, 32, 3)


def test_a_pipeline_draws_its_own_size_where_none_is_asked_for(monkeypatch):
    pipe = tiny_sana_pipeline()

    def stop(prompt, height, width, *others):
        raise KronAError(f"{height} x {width}")

    monkeypatch.setattr(pipe, "check_inputs", stop)
    with pytest.raises(KronAError, match="1024 x 1024"):
        generate(pipe, ["a toy"])
