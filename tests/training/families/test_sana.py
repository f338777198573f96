import pytest
import torch

from diffusekrona.training import UnsupportedPipelineError
from diffusekrona.training.families import family_of
from tests.pipelines import tiny_sana_pipeline
from tests.training.families.steps import CPU, Step


def the_scripts_loss(step):
    """As examples/dreambooth/train_dreambooth_lora_sana.py computes it."""
    pipe = step.pipe
    instruction = type(pipe).__call__.__wrapped__.__defaults__[-1]
    hidden, mask, _, _ = pipe.encode_prompt(step.prompts, complex_human_instruction=instruction)
    sigma = (step.timesteps / 1000).view(-1, 1, 1, 1)
    said = pipe.transformer(
        hidden_states=(1 - sigma) * step.latents + sigma * step.noise,
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        timestep=step.timesteps,
        return_dict=False,
    )[0]
    return ((said - (step.noise - step.latents)) ** 2).reshape(2, -1).mean(1).mean()


def test_loss_and_gradients_are_those_of_diffusers_script():
    Step(tiny_sana_pipeline()).is_that_of(the_scripts_loss)


def test_latents_have_no_spread_and_the_autoencoders_scale():
    pipe = tiny_sana_pipeline()
    pixels = torch.rand(1, 3, 32, 64)
    with torch.no_grad():
        mean, std = family_of(pipe).posterior(pixels)
        torch.testing.assert_close(mean, pipe.vae.encode(pixels).latent * 0.4)
    assert not std.any()
    assert family_of(pipe).tokens(32, 64) == mean[0, 0].numel()


def test_a_transformers_scale_of_timesteps_counts():
    pipe = tiny_sana_pipeline()
    pipe.transformer.register_to_config(timestep_scale=0.001)
    heard = []
    pipe.transformer.time_embed.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    family = family_of(pipe)
    family.predict(torch.zeros(1, 4, 8, 8), torch.tensor([250.0]), family.encode(["a toy"], CPU), torch.zeros(1, 6))
    assert heard[0].tolist() == [0.25]


def test_sprint_is_refused():
    pipe = tiny_sana_pipeline()
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(UnsupportedPipelineError, match="SANA-Sprint"):
        family_of(pipe)
