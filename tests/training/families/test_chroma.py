import pytest
import torch
from diffusers import ChromaImg2ImgPipeline, ChromaPipeline

from diffusekrona.training.families import family_of
from tests.pipelines import tiny_chroma_pipeline
from tests.training.families.steps import CPU, Step
from tests.training.families.test_families import told

PROMPTS = ["a toy", "a sks toy on a beach, at dawn"]


def the_pipelines_error(step):
    """Of what the pipeline gives its scheduler in a step of its own, for one image after the other."""
    pipe, answers = step.pipe, []
    euler = pipe.scheduler.step
    pipe.scheduler.step = lambda answer, *args, **kwargs: answers.append(answer) or euler(answer, *args, **kwargs)
    height, width = (side * pipe.vae_scale_factor for side in step.latents.shape[-2:])
    for latents, noise, timestep, prompt in zip(step.latents, step.noise, step.timesteps, step.prompts, strict=True):
        sigma = timestep / 1000
        tokens = pipe._pack_latents(((1 - sigma) * latents + sigma * noise)[None], 1, *latents.shape)
        options = {"sigmas": [float(sigma)], "guidance_scale": 1.0, "height": height, "width": width}
        call = ChromaPipeline.__call__.__wrapped__  # which keeps gradients
        call(pipe, prompt, latents=tokens, num_inference_steps=1, output_type="latent", **options)
    said = pipe._unpack_latents(torch.cat(answers), height, width, pipe.vae_scale_factor)
    return (said - (step.noise - step.latents)).square().mean()


def test_loss_and_gradients_are_those_of_the_pipelines_own_step():
    Step(tiny_chroma_pipeline(shift=1.0)).is_that_of(the_pipelines_error)


def test_the_mask_is_of_each_prompt_and_one_token_of_padding_and_then_of_the_image():
    pipe = tiny_chroma_pipeline()
    family = family_of(pipe)
    text = family.encode(PROMPTS, CPU)
    lengths = [len(ids) for ids in pipe.tokenizer(PROMPTS).input_ids]
    assert lengths[0] < lengths[1]
    assert text["mask"].sum(1).tolist() == [length + 1 for length in lengths]
    noisy = torch.randn(2, 4, 8, 16)
    heard, _ = told(family.denoiser, lambda: family.predict(noisy, torch.ones(2), text, torch.zeros(2, 6)))
    torch.testing.assert_close(heard["attention_mask"][:, :512], text["mask"])
    assert heard["attention_mask"][:, 512:].tolist() == [[1.0] * 32] * 2
    assert heard["img_ids"].tolist() == pipe._prepare_latent_image_ids(2, 4, 8, CPU, torch.float32).tolist()


def test_the_mask_counts():
    family = family_of(tiny_chroma_pipeline())
    noisy, text = torch.randn(1, 4, 8, 8), family.encode(["a toy"], CPU)
    said = [
        family.predict(noisy, torch.ones(1), {**text, "mask": mask}, torch.zeros(1, 6))
        for mask in (text["mask"], torch.ones_like(text["mask"]))
    ]
    assert (said[0] - said[1]).abs().max() > 1e-6


def test_blocks_are_recomputed_with_the_mask_as_they_were_computed():
    family = family_of(tiny_chroma_pipeline())
    with torch.no_grad():
        text, noisy = family.encode(PROMPTS, CPU), torch.randn(2, 4, 8, 8)
    found = []
    for switch in (family.denoiser.disable_gradient_checkpointing, family.denoiser.enable_gradient_checkpointing):
        switch()
        function = family.denoiser.__dict__.get("_gradient_checkpointing_func")
        family.denoiser.zero_grad()
        family.predict(noisy, torch.ones(2), text, torch.zeros(2, 6)).square().mean().backward()
        assert family.denoiser.__dict__.get("_gradient_checkpointing_func") is function
        found.append(family.denoiser.single_transformer_blocks[0].attn.to_q.weight.grad.clone())
    torch.testing.assert_close(*found)


def test_what_the_text_encoder_does_not_read_of_a_prompt_is_known():
    family = family_of(tiny_chroma_pipeline())
    assert family.unread("a toy") == ""
    assert set(family.unread("a " * 400)) == {"a", " "}


def test_the_shift_is_the_pipelines():
    assert family_of(tiny_chroma_pipeline()).shift(64) == 3
    dynamic = tiny_chroma_pipeline(use_dynamic_shifting=True)
    assert family_of(dynamic).shift(4096) == pytest.approx(torch.tensor(1.15).exp().item())


def test_a_pipeline_that_starts_from_an_image_trains_the_same():
    pipe = tiny_chroma_pipeline()
    other = family_of(ChromaImg2ImgPipeline(**{name: part for name, part in pipe.components.items() if part}))
    noisy, text = torch.randn(1, 4, 8, 8), other.encode(["a toy"], CPU)
    said = [family.predict(noisy, torch.ones(1), text, torch.zeros(1, 6)) for family in (other, family_of(pipe))]
    torch.testing.assert_close(*said)
