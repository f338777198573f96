from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffusekrona.training import UnsupportedPipelineError, prepare_images
from diffusekrona.training.conditioning import TextConditioning, check_pipeline
from tests.pipelines import IMAGE_SIZE, tiny_sd_pipeline, tiny_sdxl_pipeline

PROMPTS = ["a sks toy", "a dog on sand", "a sks toy"]
PIPELINES = pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline])


def examples(prompts=PROMPTS, size=(IMAGE_SIZE, IMAGE_SIZE)):
    return prepare_images([Image.new("RGB", size)] * len(prompts), prompts, IMAGE_SIZE)


def conditioning(pipe, images=None, trainable=False, dtype=torch.float32):
    return TextConditioning(pipe, images or examples(), trainable=trainable, dtype=dtype)


def close(actual, expected):
    """Equal up to what the size of a batch changes in the rounding of matrix products."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def what_the_pipeline_says(pipe, prompt):
    """The UNet's keyword arguments when the pipeline itself generates from a prompt, without guidance."""
    said = {}
    hook = pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: said.update(kwargs), with_kwargs=True)
    pipe(prompt, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    hook.remove()
    return said


@PIPELINES
@pytest.mark.parametrize("trainable", [False, True])
def test_the_unet_hears_what_the_pipeline_would_tell_it(build, trainable):
    pipe = build()
    expected = what_the_pipeline_says(pipe, PROMPTS[1])
    given = conditioning(pipe, trainable=trainable)([1])
    close(given["encoder_hidden_states"], expected["encoder_hidden_states"])
    for name, tensor in (expected["added_cond_kwargs"] or {}).items():
        close(given["added_cond_kwargs"][name], tensor)
    assert ("added_cond_kwargs" in given) == (expected["added_cond_kwargs"] is not None)


@PIPELINES
@pytest.mark.parametrize("trainable", [False, True])
def test_rows_follow_the_images_asked_for(build, trainable):
    source = conditioning(build(), trainable=trainable)
    together, alone = source([1, 2, 0, 1]), [source([index]) for index in (1, 2, 0, 1)]
    for row, single in enumerate(alone):
        close(together["encoder_hidden_states"][row], single["encoder_hidden_states"][0])
    assert not torch.equal(alone[0]["encoder_hidden_states"], alone[1]["encoder_hidden_states"])


def test_sdxl_hears_the_original_size_the_crop_and_the_target_size():
    images = examples(["a", "b"], size=(96, 64)) + examples(["c"], size=(16, 32))
    given = conditioning(tiny_sdxl_pipeline(), images)([2, 0])["added_cond_kwargs"]["time_ids"]
    assert given.tolist() == [[32, 16, 16, 0, 32, 32], [64, 96, 0, 8, 32, 32]]


@PIPELINES
def test_frozen_encoders_run_once_per_distinct_prompt_and_never_again(build):
    pipe, rows = build(), []
    pipe.text_encoder.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    source = conditioning(pipe)
    source([0, 1, 2])
    source([2])
    assert rows == [2]


@PIPELINES
def test_gradients_reach_trainable_encoders_and_not_frozen_ones(build):
    pipe = build()
    assert not conditioning(pipe)([0])["encoder_hidden_states"].requires_grad
    conditioning(pipe, trainable=True)([0, 1])["encoder_hidden_states"].sum().backward()
    encoders = [pipe.text_encoder] + ([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])
    for encoder in encoders:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_embeddings_have_the_unets_type():
    given = conditioning(tiny_sdxl_pipeline(), dtype=torch.bfloat16)([0])
    assert given["encoder_hidden_states"].dtype == torch.bfloat16
    assert given["added_cond_kwargs"]["text_embeds"].dtype == torch.bfloat16


@PIPELINES
def test_stable_diffusion_and_sdxl_are_supported(build):
    check_pipeline(build())


def test_a_pipeline_without_a_unet_is_refused_by_name():
    with pytest.raises(UnsupportedPipelineError, match="SimpleNamespace has no unet"):
        check_pipeline(SimpleNamespace(vae=1, scheduler=1, tokenizer=1, text_encoder=1, encode_prompt=1))


def test_an_inpainting_unet_is_refused():
    pipe = tiny_sd_pipeline()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(UnsupportedPipelineError, match="takes 9 channels, but its autoencoder gives 4"):
        check_pipeline(pipe)


def test_an_unknown_kind_of_conditioning_is_refused():
    pipe = tiny_sd_pipeline()
    pipe.unet.register_to_config(addition_embed_type="image")
    with pytest.raises(UnsupportedPipelineError, match="'image'"):
        check_pipeline(pipe)
