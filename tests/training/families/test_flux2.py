import math

import pytest
import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from diffusekrona.training.families import family_of
from diffusekrona.training.families.flux2 import mu
from tests.pipelines import tiny_flux2_pipeline, tiny_klein_pipeline
from tests.training.families.steps import CPU, Step
from tests.training.families.test_families import told

EACH = pytest.mark.parametrize("build", [tiny_flux2_pipeline, tiny_klein_pipeline], ids=["flux2", "klein"])


def the_scripts_loss(step):
    """As examples/dreambooth/train_dreambooth_lora_flux2.py and its sister for klein compute it."""
    pipe, latents = step.pipe, step.latents
    hidden, text_ids = pipe.encode_prompt(prompt=step.prompts, max_sequence_length=512)
    image_ids = Flux2Pipeline._prepare_latent_ids(latents)
    sigma = (step.timesteps / 1000).view(-1, 1, 1, 1)
    tokens = Flux2Pipeline._pack_latents((1 - sigma) * latents + sigma * step.noise)
    guidance = torch.full([1], step.family.guidance).expand(2) if pipe.transformer.config.guidance_embeds else None
    said = pipe.transformer(
        hidden_states=tokens,
        timestep=step.timesteps / 1000,
        guidance=guidance,
        encoder_hidden_states=hidden,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    said = Flux2Pipeline._unpack_latents_with_ids(said, image_ids)
    return ((said - (step.noise - latents)) ** 2).reshape(2, -1).mean(1).mean()


@EACH
def test_loss_and_gradients_are_those_of_diffusers_scripts(build):
    step = Step(build())
    step.family.guidance = 3.5
    step.is_that_of(the_scripts_loss)


@EACH
def test_latents_are_patches_normalised_as_the_pipeline_does_it_with_an_image_that_is_edited(build):
    pipe = build()
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = family_of(pipe).posterior(pixels)
        expected = pipe._encode_vae_image(pixels, None)
        spread = pipe._patchify_latents(pipe.vae.encode(pixels).latent_dist.std)
    assert mean.shape[1:] == std.shape[1:] == family_of(pipe).latent_shape(32, 64) == (16, 4, 8)
    torch.testing.assert_close(mean, expected)
    scales = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(std, spread / scales)


def test_only_a_guided_transformer_is_told_of_guidance():
    for build, expected in ((tiny_flux2_pipeline, [2.5, 2.5]), (tiny_klein_pipeline, None)):
        family = family_of(build())
        family.guidance = 2.5
        text = family.encode(["a toy", "a dog"], CPU)
        noisy, times = torch.zeros(2, *family.latent_shape(32, 32)), torch.ones(2)
        heard, _ = told(family.denoiser, lambda: family.predict(noisy, times, text, torch.zeros(2, 6)))  # noqa: B023
        assert (None if heard["guidance"] is None else heard["guidance"].tolist()) == expected


@pytest.mark.parametrize("tokens", [4, 1024, 4096, 4300, 4301, 8100])
@pytest.mark.parametrize("steps", [10, 50, 200])
def test_the_shift_is_the_one_that_the_pipeline_computes(tokens, steps):
    assert mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


def test_the_shift_is_the_schedulers_own_where_it_does_not_depend_on_the_size():
    pipe = tiny_flux2_pipeline()
    assert family_of(pipe).shift(1024) == math.exp(mu(1024))
    pipe.scheduler.register_to_config(time_shift_type="linear")
    assert family_of(pipe).shift(1024) == mu(1024)
    pipe.scheduler.register_to_config(use_dynamic_shifting=False)
    assert family_of(pipe).shift(1024) == 3
