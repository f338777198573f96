from types import SimpleNamespace

import pytest
import torch

from diffusekrona.training import ImagePlan, UnsupportedPipelineError, prepare_images, training_resolution
from diffusekrona.training.batches import text_encoders
from diffusekrona.training.encoding import Texts
from diffusekrona.training.families import family_of
from diffusekrona.training.objective import FlowMatching, objective_of
from tests.pipelines import FAMILIES, IMAGE_SIZE, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import pictures

CPU = torch.device("cpu")
PROMPT = "a dog on sand"
EACH = pytest.mark.parametrize("tiny", FAMILIES.values(), ids=FAMILIES)
TIMES = torch.tensor([3.0, 500.0])


def told(denoiser, run):
    """The keyword arguments that a denoiser is called with; those by place are `sample` and `timestep`."""
    said = {}

    def listen(module, args, kwargs):
        said.update(dict(zip(("sample", "timestep", "context"), args, strict=False)), **kwargs)

    hook = denoiser.register_forward_pre_hook(listen, with_kwargs=True)
    with torch.no_grad():
        answer = run()
    hook.remove()
    return said, answer


def close(actual, expected):
    """Equal up to rounding."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def tensors_in(said, path=""):
    """All that a denoiser is told, in lists and dictionaries too, as tensors by name."""
    if isinstance(said, (list, tuple)):
        said = {str(number): value for number, value in enumerate(said)}
    if isinstance(said, dict):
        return {name: t for key, value in said.items() for name, t in tensors_in(value, f"{path}/{key}").items()}
    if isinstance(said, (torch.Tensor, int, float)) and not isinstance(said, bool):
        return {path: torch.as_tensor(said)}
    return {}


def one_step(pipe, prompt=PROMPT, **options):
    """What a pipeline tells its denoiser in a single step without guidance, and what its scheduler is told of that."""
    answers = []
    step = pipe.scheduler.step

    def listen(answer, *args, **kwargs):
        answers.append(answer)
        return step(answer, *args, **kwargs)

    pipe.scheduler.step = listen
    usual = {"num_inference_steps": 1, "height": IMAGE_SIZE, "width": IMAGE_SIZE, "output_type": "latent"}
    options = {"guidance_scale": 1.0} | usual | options
    said, _ = told(family_of(pipe).denoiser, lambda: pipe(prompt=prompt, **options))
    return said, answers[0]


def latents_of(family, batch=1, seed=0):
    """Noise in the shape of the latents of images of the usual size."""
    shape = family.latent_shape(IMAGE_SIZE, IMAGE_SIZE)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


@EACH
def test_the_denoiser_hears_what_the_pipeline_would_tell_it(tiny):
    """The pipeline's own step and the trainer's on the same noise, from the prompt to what a scheduler is told."""
    pipe = tiny.build()
    family = family_of(pipe)
    noisy = latents_of(family)
    theirs, answer = one_step(pipe, latents=tiny.given(pipe, noisy), **tiny.options)
    sizes = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]], dtype=torch.float32)
    timesteps = pipe.scheduler.timesteps[:1]
    with torch.no_grad():
        text = family.encode([PROMPT], CPU)
    # Some schedulers' noise is not of variance 1.
    scaled = pipe.scheduler.scale_model_input(noisy, timesteps[0]) if family.PART == "unet" else noisy
    ours, prediction = told(family.denoiser, lambda: family.predict(scaled, timesteps, text, sizes))
    expected, given = tensors_in(theirs), tensors_in(ours)
    assert expected.keys() == given.keys()
    for name, tensor in expected.items():
        close(given[name].squeeze().float(), tensor.squeeze().float())
    close(tiny.stepped(pipe, prediction), answer)


@EACH
def test_a_prompts_rows_do_not_depend_on_the_others_of_its_batch(tiny):
    """Prompts of different lengths in one batch, each as it is alone; the levels of noise differ, too."""
    family = family_of(tiny.build())
    noisy, sizes = latents_of(family, 2), torch.zeros(2, 6)
    prompts = [PROMPT, "a dog"]
    texts = Texts(family, prompts, text_encoders(family.pipe), trained=False, device=CPU)
    with torch.no_grad():
        both = family.predict(noisy, TIMES, texts(prompts), sizes)
        each = [family.predict(noisy[[i]], TIMES[[i]], texts([prompts[i]]), sizes[[i]]) for i in (0, 1)]
    assert both.shape == noisy.shape
    torch.testing.assert_close(both, torch.cat(each), atol=1e-4, rtol=1e-4)


@EACH
def test_blocks_that_are_recomputed_say_the_same(tiny):
    """With gradient checkpointing, a short prompt beside a long one."""
    family = family_of(tiny.build())
    noisy, prompts, sizes = latents_of(family, 2), [PROMPT * 4, "a dog"], torch.zeros(2, 6)
    text = Texts(family, prompts, text_encoders(family.pipe), trained=False, device=CPU)(prompts)
    expected = family.predict(noisy, TIMES, text, sizes)
    family.denoiser.enable_gradient_checkpointing()
    close(family.predict(noisy, TIMES, text, sizes), expected)


@EACH
def test_latents_are_those_that_the_pipeline_decodes(tiny):
    """Encoded and scaled as the denoiser has them, then given to the pipeline as what its last step left."""
    pipe = tiny.build()
    family = family_of(pipe)
    pixels = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = family.posterior(pixels)
    assert mean.shape[1:] == std.shape[1:] == family.latent_shape(IMAGE_SIZE, IMAGE_SIZE)
    pipe.scheduler.step = lambda *args, **kwargs: (tiny.stepped(pipe, mean),)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    found = pipe(prompt=PROMPT, num_inference_steps=1, output_type="pt", **size, **tiny.options)[0]
    torch.testing.assert_close(found, tiny.decoded(pipe, pixels), atol=1e-4, rtol=0)


@EACH
def test_an_example_is_shaped_like_the_longest_prompt(tiny):
    family = family_of(tiny.build())
    told = family.encode(["a dog " * 1000], CPU)
    example = family.example(1)
    assert {name: told[name].shape for name in example} == {name: tensor.shape for name, tensor in example.items()}
    assert all(told[name].dtype == torch.bool and told[name].all() for name in told.keys() - example.keys())


@EACH
def test_what_is_said_to_be_unread_is_just_what_changes_nothing(tiny):
    """The last letter that is read changes the encoding, and all after it together do not."""
    family = family_of(tiny.build())
    prompt = "xy" * 700
    unread = family.unread(prompt)
    if family.TOKENS is None:  # all is read, or nothing is known of it
        assert not unread
        return
    assert prompt.endswith(unread)
    assert 20 < len(unread) < 1400
    assert not family.unread(prompt[: -len(unread)])
    read = prompt[: -len(unread)]
    with torch.no_grad():
        texts = prompt, read + "z" * len(unread), read[:-1] + "z" + unread
        whole, other, changed = (family.encode([text], CPU)["hidden"] for text in texts)
    close(other, whole)
    assert not torch.allclose(changed, whole)


@EACH
def test_noise_levels_are_shifted_as_the_pipelines_are(tiny):
    pipe = tiny.build()
    family, goal = family_of(pipe), objective_of(pipe.scheduler, CPU)
    one_step(pipe, num_inference_steps=50, **tiny.options)  # FLUX.2 shifts by the number of steps, too
    if isinstance(goal, FlowMatching):
        shift = family.shift(family.tokens(IMAGE_SIZE, IMAGE_SIZE))
        places = [1 - step / 50 for step in range(50)]
        expected = [goal.level(place, shift) for place in places]
        # The last of a pipeline's σ may be stretched, or start a little above 0.
        assert pipe.scheduler.sigmas[:25].tolist() == pytest.approx(expected[:25], abs=1e-2)


def test_sdxl_hears_the_original_size_the_crop_and_the_target_size():
    family, plan = family_of(tiny_sdxl_pipeline()), ImagePlan(IMAGE_SIZE)
    images = prepare_images([*pictures(1, (96, 64)), *pictures(1, (16, 32))], PROMPT, plan)
    sizes = torch.tensor([images[1].sizes, images[0].sizes], dtype=torch.float32)
    text = family.encode([PROMPT] * 2, CPU)
    said, _ = told(family.denoiser, lambda: family.predict(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), text, sizes))
    assert said["added_cond_kwargs"]["time_ids"].tolist() == [[32, 16, 16, 0, 32, 32], [64, 96, 0, 8, 32, 32]]


@EACH
def test_the_denoiser_and_its_type_are_found(tiny):
    pipe = tiny.build()
    family = family_of(pipe)
    assert family.denoiser is (getattr(pipe, "unet", None) or pipe.transformer)
    assert family.dtype == torch.float32
    family.denoiser.to(torch.bfloat16)
    assert family.dtype == torch.bfloat16


def test_a_pipeline_without_a_denoiser_is_refused_by_name():
    with pytest.raises(UnsupportedPipelineError, match=r"SimpleNamespace is none .* SDXL, .* page Families"):
        family_of(SimpleNamespace(vae=1, scheduler=1, tokenizer=1, text_encoder=1, encode_prompt=1))


@pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sd3_pipeline])
def test_an_inpainting_denoiser_is_refused(build):
    pipe = build()
    family_of(pipe).denoiser.register_to_config(in_channels=9)
    with pytest.raises(UnsupportedPipelineError, match="takes 9 channels, but its autoencoder gives 4"):
        family_of(pipe)


def test_a_base_that_does_not_say_its_size_is_asked_for_a_resolution():
    pipe = tiny_sd_pipeline()
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(UnsupportedPipelineError, match="sample_size is null"):
        training_resolution(pipe, None)
    assert training_resolution(pipe, 32) == 32


def test_an_unknown_kind_of_conditioning_is_refused():
    pipe = tiny_sd_pipeline()
    pipe.unet.register_to_config(addition_embed_type="image")
    with pytest.raises(UnsupportedPipelineError, match="'image'"):
        family_of(pipe)
