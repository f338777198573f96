import math

import pytest
import torch

from diffusekrona.training.families import family_of
from tests.pipelines import tiny_krea2_pipeline
from tests.training.families.steps import CPU, Step, shifts_as_its_pipeline


def the_scripts_loss(step):
    """As examples/dreambooth/train_dreambooth_lora_krea2.py computes it, frames and all."""
    pipe, latents, noise = step.pipe, step.latents.unsqueeze(2), step.noise.unsqueeze(2)
    pairs = [pipe.encode_prompt(prompt) for prompt in step.prompts]  # each prompt alone
    hidden, mask = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    count, channels, _, height, width = latents.shape
    sigma = (step.timesteps / 1000).view(-1, 1, 1, 1, 1)
    noisy = ((1 - sigma) * latents + sigma * noise).permute(0, 2, 1, 3, 4)
    said = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, count, channels, height, width),
        encoder_hidden_states=hidden,
        timestep=step.timesteps / 1000,
        position_ids=pipe.prepare_position_ids(hidden.shape[1], height // 2, width // 2, CPU),
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    said = pipe._unpack_latents(said, height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
    return ((said - (noise - latents)) ** 2).reshape(count, -1).mean(1).mean()


def test_loss_and_gradients_are_those_of_diffusers_script():
    Step(tiny_krea2_pipeline()).is_that_of(the_scripts_loss)


def test_what_the_padding_holds_does_not_count():
    step = Step(tiny_krea2_pipeline())
    text = step.family.encode(step.prompts, CPU)
    assert not text["mask"][:, 200].any()
    assert text["mask"][:, -5:].all()  # the template's end, after the padding
    changed = {**text, "hidden": text["hidden"].masked_fill(~text["mask"][..., None, None], 7.0)}
    with torch.no_grad():
        one, other = (step.family.predict(step.latents, step.timesteps, each, None) for each in (text, changed))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("distilled", [True, False])
def test_distilled_models_shift_all_sizes_alike(distilled):
    assert shifts_as_its_pipeline(tiny_krea2_pipeline(0, distilled, base_image_seq_len=8), (32, 64))
    family = family_of(tiny_krea2_pipeline(distilled=distilled))
    assert family.tokens(32, 64) == 32
    assert family.shift(6400) == pytest.approx(math.exp(1.15))
    assert family.shift(256) == pytest.approx(math.exp(1.15 if distilled else 0.5))
