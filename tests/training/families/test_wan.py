import pytest
import torch
from diffusers import WanImageToVideoPipeline

from diffusekrona.training import UnsupportedPipelineError
from diffusekrona.training.families import family_of
from tests.pipelines import tiny_wan_pipeline
from tests.training.families.steps import CPU, Step
from tests.training.families.test_families import close, latents_of, one_step, tensors_in, told


def the_pipelines_error(step):
    """Of each image in a step of the pipeline, as a video of one frame."""
    pipe, errors = step.pipe, []
    for latents, noise, timestep, prompt in zip(step.latents, step.noise, step.timesteps, step.prompts, strict=True):
        hidden, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        sigma = timestep / 1000
        said = pipe.transformer(
            hidden_states=((1 - sigma) * latents + sigma * noise)[None, :, None],
            timestep=timestep[None],
            encoder_hidden_states=hidden,
            return_dict=False,
        )[0]
        errors.append((said[0, :, 0] - (noise - latents)).square().mean())
    return torch.stack(errors).mean()


def test_loss_and_gradients_are_those_of_the_pipelines_own_step():
    Step(tiny_wan_pipeline()).is_that_of(the_pipelines_error)


def test_a_model_that_is_told_the_noise_of_each_token_is_told_so():
    pipe = tiny_wan_pipeline(expand_timesteps=True)
    family = family_of(pipe)
    noisy = latents_of(family)
    theirs, answer = one_step(pipe, latents=noisy.unsqueeze(2), num_frames=1)
    text = family.encode(["a dog on sand"], CPU)
    ours, prediction = told(family.denoiser, lambda: family.predict(noisy, pipe.scheduler.timesteps[:1], text, None))
    assert family.tokens(32, 32) == 16
    assert ours["timestep"].shape == theirs["timestep"].shape == (1, 16)
    assert tensors_in(ours).keys() == tensors_in(theirs).keys()
    close(prediction.unsqueeze(2), answer)


def test_two_transformers_are_refused():
    second = tiny_wan_pipeline().transformer
    with pytest.raises(UnsupportedPipelineError, match="WanPipeline has two transformers"):
        family_of(tiny_wan_pipeline(transformer_2=second, boundary_ratio=0.9))


def test_a_transformer_that_is_given_an_image_is_refused():
    pipe = tiny_wan_pipeline()
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    pipe = WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None)
    pipe.transformer.register_to_config(in_channels=9)
    with pytest.raises(UnsupportedPipelineError, match="takes 9 channels, but its autoencoder gives 4"):
        family_of(pipe)
