import pytest
import torch
from diffusers import FluxControlPipeline, FluxFillPipeline, FluxKontextPipeline, FluxPipeline

from diffusekrona.training import UnsupportedPipelineError
from diffusekrona.training.families import family_of
from tests.pipelines import tiny_flux_pipeline
from tests.pipelines.flux import packed
from tests.training.families.steps import CPU, Step
from tests.training.families.test_families import close, latents_of, one_step, told

KINDS = {"dev": True, "schnell": False}
EACH = pytest.mark.parametrize("guided", KINDS.values(), ids=KINDS)


def the_scripts_loss(step):
    """As examples/dreambooth/train_dreambooth_lora_flux.py computes it."""
    pipe, latents = step.pipe, step.latents
    hidden, pooled, text_ids = pipe.encode_prompt(prompt=step.prompts, prompt_2=None, max_sequence_length=512)
    count, channels, height, width = latents.shape
    sigma = (step.timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * step.noise
    guidance = torch.tensor([step.family.guidance]).expand(count) if pipe.transformer.config.guidance_embeds else None
    said = pipe.transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
        timestep=step.timesteps / 1000,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=hidden,
        txt_ids=text_ids,
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, CPU, torch.float32),
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    said = FluxPipeline._unpack_latents(said, height * factor, width * factor, factor)
    return ((said - (step.noise - latents)) ** 2).reshape(count, -1).mean(1).mean()


@EACH
def test_loss_and_gradients_are_those_of_diffusers_script(guided):
    step = Step(tiny_flux_pipeline(guided=guided))
    step.family.guidance = 3.5
    step.is_that_of(the_scripts_loss)


@EACH
def test_the_transformer_hears_of_guidance_where_the_pipeline_tells_it(guided):
    pipe = tiny_flux_pipeline(guided=guided)
    family = family_of(pipe)
    family.guidance = 3.5
    noisy = latents_of(family)
    theirs, answer = one_step(pipe, latents=packed(pipe, noisy), guidance_scale=3.5)
    text = family.encode(["a dog on sand"], CPU)
    ours, said = told(family.denoiser, lambda: family.predict(noisy, pipe.scheduler.timesteps[:1], text, None))
    assert [None if heard["guidance"] is None else heard["guidance"].tolist() for heard in (ours, theirs)] == (
        [[3.5], [3.5]] if guided else [None, None]
    )
    close(packed(pipe, said), answer)


def test_the_shift_grows_with_the_size_for_dev_and_is_none_for_schnell():
    dev = family_of(tiny_flux_pipeline(use_dynamic_shifting=True))
    assert [dev.shift(tokens) for tokens in (256, 4096)] == pytest.approx(torch.tensor([0.5, 1.15]).exp().tolist())
    schnell = family_of(tiny_flux_pipeline(shift=1.0))
    assert [schnell.shift(tokens) for tokens in (256, 4096)] == [1, 1]


@pytest.mark.parametrize(("kind", "channels"), [(FluxControlPipeline, 32), (FluxFillPipeline, 96)])
def test_transformers_that_are_given_an_image_are_refused(kind, channels):
    pipe = tiny_flux_pipeline()
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    other = kind(**parts)
    other.transformer.register_to_config(in_channels=channels)
    with pytest.raises(UnsupportedPipelineError, match=f"takes {channels} channels, but its autoencoder gives 4 in"):
        family_of(other)


def test_kontext_is_trained_as_a_model_from_text_to_image():
    """It is given an image beside the latents, and may be given none."""
    pipe = tiny_flux_pipeline()
    kontext = family_of(FluxKontextPipeline(**{name: part for name, part in pipe.components.items() if part}))
    noisy, text, times = latents_of(kontext), kontext.encode(["a toy"], CPU), torch.ones(1)
    close(kontext.predict(noisy, times, text, None), family_of(pipe).predict(noisy, times, text, None))
