import pytest
import torch
from diffusers import LCMScheduler, PixArtAlphaPipeline

from diffusekrona.training.families import family_of
from tests.pipelines import tiny_pixart_pipeline
from tests.training.families.steps import CPU, Step
from tests.training.families.test_families import close, latents_of, one_step, tensors_in, told


def the_pipelines_error(step):
    """Of each image in a step of the pipeline, whose scheduler is told the first half of what the transformer says."""
    pipe, errors = step.pipe, []
    for latents, noise, timestep, prompt in zip(step.latents, step.noise, step.timesteps, step.prompts, strict=True):
        hidden, mask, _, _ = pipe.encode_prompt(prompt, clean_caption=True)
        share = pipe.scheduler.alphas_cumprod[timestep]
        said = pipe.transformer(
            (share.sqrt() * latents + (1 - share).sqrt() * noise)[None],
            encoder_hidden_states=hidden,
            encoder_attention_mask=mask,
            timestep=timestep[None],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        errors.append((said.chunk(2, dim=1)[0][0] - noise).square().mean())
    return torch.stack(errors).mean()


def test_loss_and_gradients_are_those_of_the_pipelines_own_step():
    Step(tiny_pixart_pipeline()).is_that_of(the_pipelines_error)


@pytest.mark.parametrize("height", [32, 64])
def test_alpha_of_1024_pixels_is_told_of_sizes(height):
    pipe = tiny_pixart_pipeline(kind=PixArtAlphaPipeline, sample_size=128)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)  # with which α draws in a single step
    family = family_of(pipe)
    assert family.tokens(32, 32) == 16
    noisy = torch.cat([latents_of(family)] * (height // 32), dim=2)
    theirs, _ = one_step(pipe, latents=noisy, height=height)
    text = family.encode(["a dog on sand"], CPU)
    assert text["hidden"].shape[1] == 120
    ours, _ = told(family.denoiser, lambda: family.predict(noisy, pipe.scheduler.timesteps[:1], text, None))
    expected, given = tensors_in(theirs), tensors_in(ours)
    assert expected.keys() == given.keys() > {"/added_cond_kwargs/resolution", "/added_cond_kwargs/aspect_ratio"}
    for name, tensor in expected.items():
        close(given[name].float(), tensor.float())
