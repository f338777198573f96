from types import SimpleNamespace

import pytest
import torch

from diffusekrona.training import ImagePlan, UnsupportedPipelineError, prepare_images
from diffusekrona.training.families import family_of
from tests.pipelines import IMAGE_SIZE, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import FAMILIES, pictures

CPU = torch.device("cpu")
PROMPT = "a dog on sand"


def close(actual, expected):
    """Equal up to what the size of a batch changes in the rounding of matrix products."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def told(family, run):
    """The keyword arguments that a denoiser is called with; those by place are `sample` and `timestep`."""
    said = {}

    def listen(module, args, kwargs):
        said.update(dict(zip(("sample", "timestep"), args, strict=False)), **kwargs)

    hook = family.denoiser.register_forward_pre_hook(listen, with_kwargs=True)
    with torch.no_grad():
        answer = run()
    hook.remove()
    return said, answer


def tensors_in(said):
    """All tensors but the noise that the pipeline drew, which has another name in each family."""
    flat = {**said, **(said.get("added_cond_kwargs") or {})}
    return {name: value for name, value in flat.items() if isinstance(value, torch.Tensor) and value.dim()}


@FAMILIES
def test_the_denoiser_hears_what_the_pipeline_would_tell_it(build):
    pipe = build()
    family = family_of(pipe)
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    theirs, _ = told(family, lambda: pipe(PROMPT, height=IMAGE_SIZE, width=IMAGE_SIZE, **options))
    noisy = theirs.get("sample", theirs.get("hidden_states"))
    sizes = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]], dtype=torch.float32)
    with torch.no_grad():
        text = family.encode([PROMPT], CPU)
    ours, _ = told(family, lambda: family.predict(noisy, theirs["timestep"].reshape(1), text, sizes))
    expected, given = tensors_in(theirs), tensors_in(ours)
    assert expected.keys() - {"timestep"} == given.keys() - {"timestep"}
    for name, tensor in expected.items():
        close(given[name], tensor)


@FAMILIES
def test_the_prediction_is_the_denoisers_and_shaped_like_the_latents(build):
    family = family_of(build())
    noisy, text = torch.randn(2, 4, 8, 8), family.encode([PROMPT] * 2, CPU)
    _, said = told(family, lambda: family.predict(noisy, torch.tensor([3, 500]), text, torch.zeros(2, 6)))
    assert said.shape == noisy.shape
    each = [
        told(
            family,
            lambda i=i: family.predict(
                noisy[[i]], torch.tensor([3, 500])[[i]], family.encode([PROMPT], CPU), torch.zeros(1, 6)
            ),
        )[1]
        for i in (0, 1)
    ]
    torch.testing.assert_close(said, torch.cat(each), atol=1e-4, rtol=1e-4)


def test_sdxl_hears_the_original_size_the_crop_and_the_target_size():
    family, plan = family_of(tiny_sdxl_pipeline()), ImagePlan(IMAGE_SIZE)
    images = prepare_images([*pictures(1, (96, 64)), *pictures(1, (16, 32))], PROMPT, plan)
    sizes = torch.tensor([images[1].sizes, images[0].sizes], dtype=torch.float32)
    text = family.encode([PROMPT] * 2, CPU)
    said, _ = told(family, lambda: family.predict(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), text, sizes))
    assert said["added_cond_kwargs"]["time_ids"].tolist() == [[32, 16, 16, 0, 32, 32], [64, 96, 0, 8, 32, 32]]


@FAMILIES
def test_the_denoiser_and_its_type_are_found(build):
    pipe = build()
    family = family_of(pipe)
    assert family.denoiser is getattr(pipe, "unet", None) or family.denoiser is getattr(pipe, "transformer", None)
    assert family.dtype == torch.float32
    family.denoiser.to(torch.bfloat16)
    assert family.dtype == torch.bfloat16


def test_a_pipeline_without_a_denoiser_is_refused_by_name():
    with pytest.raises(UnsupportedPipelineError, match=r"SimpleNamespace is none of the pipelines .* unet, vae"):
        family_of(SimpleNamespace(vae=1, scheduler=1, tokenizer=1, text_encoder=1, encode_prompt=1))


@pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sd3_pipeline])
def test_an_inpainting_denoiser_is_refused(build):
    pipe = build()
    family_of(pipe).denoiser.register_to_config(in_channels=9)
    with pytest.raises(UnsupportedPipelineError, match="takes 9 channels, but its autoencoder gives 4"):
        family_of(pipe)


def test_an_unknown_kind_of_conditioning_is_refused():
    pipe = tiny_sd_pipeline()
    pipe.unet.register_to_config(addition_embed_type="image")
    with pytest.raises(UnsupportedPipelineError, match="'image'"):
        family_of(pipe)
