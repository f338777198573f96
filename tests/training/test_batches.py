import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusekrona.training import ImagePlan, TrainingConfig, TrainingConfigError, prepare_images
from diffusekrona.training.batches import Batches, free_encoders, text_encoders
from diffusekrona.training.families import family_of
from tests.pipelines import IMAGE_SIZE, tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import FAMILIES, SMALL, adapted, examples, pictures

CONFIG = TrainingConfig(train_batch_size=3)
PIPE = tiny_sd_pipeline()


def place(process=0, processes=1):
    """Where a process stands among others."""
    return SimpleNamespace(
        device=torch.device("cpu"), process_index=process, num_processes=processes, autocast=nullcontext
    )


def batches(config=CONFIG, pipe=PIPE, images=None, where=None, name="subject"):
    return Batches(name, pipe, family_of(pipe), images or examples(5), config, where or place())


def heard(pipe, source, numbers):
    """Noisy latents and timesteps that the UNet hears in some batches."""
    noisy, times = [], []

    def listen(module, args):
        noisy.append(args[0].detach())
        times.append(args[1])

    hook = pipe.unet.register_forward_pre_hook(listen)
    with torch.no_grad():
        for number in numbers:
            source.loss(number)
    hook.remove()
    return torch.cat(noisy), torch.cat(times)


@FAMILIES
def test_the_loss_is_one_number_with_gradients_and_the_same_each_time(build):
    pipe = build()
    source = batches(pipe=pipe)
    losses = [source.loss(number) for number in (0, 1, 0)]
    assert losses[0].shape == ()
    assert losses[0].dtype == torch.float32
    assert losses[0] == losses[2] != losses[1]
    losses[0].backward()
    assert any(parameter.grad is not None for parameter in family_of(pipe).denoiser.parameters())


def test_the_loss_is_the_mean_of_the_images_whatever_batch_they_are_in():
    """Three batches of two hold what two of three do, with the same noise, so their means have the same mean."""
    with torch.no_grad():
        twos = [batches(CONFIG.replace(train_batch_size=2)).loss(number) for number in range(3)]
        threes = [batches(CONFIG.replace(train_batch_size=3)).loss(number) for number in range(2)]
    torch.testing.assert_close(sum(twos) / 3, sum(threes) / 2, rtol=1e-5, atol=0)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_processes_share_the_batches_of_one_with_as_many_images(size, processes, number):
    whole = batches(CONFIG.replace(train_batch_size=size * processes)).sources(number)
    config = CONFIG.replace(train_batch_size=size)
    shares = [batches(config, where=place(process, processes)).sources(number) for process in range(processes)]
    assert [source for share in shares for source in share] == whole
    assert {len(share) for share in shares} == {size}


def test_without_an_offset_the_noise_has_no_common_part_and_with_one_it_has():
    spreads = {}
    for offset in (0.0, 2.0):
        pipe = tiny_sd_pipeline()
        noisy, times = heard(pipe, batches(CONFIG.replace(noise_offset=offset), pipe), range(60))
        late = times > 500
        alphas = pipe.scheduler.alphas_cumprod[times[late]].view(-1, 1)
        # Of 64 independent numbers the mean varies by an eighth, and the latents' own is small by now.
        spreads[offset] = float((noisy[late].mean(dim=(2, 3)) / (1 - alphas).sqrt()).std())
    assert spreads[0.0] < 0.5
    assert spreads[2.0] == pytest.approx(2.0, rel=0.25)


def test_seeds_and_names_give_noise_of_their_own():
    pipe = tiny_sd_pipeline()
    first, _ = heard(pipe, batches(pipe=pipe), [0])
    for other in (batches(CONFIG.replace(seed=1), pipe), batches(pipe=pipe, name="class")):
        assert not torch.equal(heard(pipe, other, [0])[0], first)


def test_marks_tell_images_prompts_and_their_order_apart():
    some = examples(3)
    others = [
        some[::-1],
        some[:2],
        examples(3, "a cup"),
        examples(3, seed=1),
        [replace(image, crop_top_left=(0, 1)) for image in some],
    ]
    marks = [batches(images=images).marks for images in [some, *others]]
    assert len(set(marks)) == len(marks)
    assert batches(images=[replace(image, source="elsewhere") for image in some]).marks == marks[0]


@pytest.mark.parametrize(("build", "count"), [(tiny_sd_pipeline, 1), (tiny_sdxl_pipeline, 2), (tiny_sd3_pipeline, 3)])
def test_the_text_encoders_of_a_pipeline_are_found(build, count):
    pipe = build()
    names = ["text_encoder", "text_encoder_2", "text_encoder_3"][:count]
    assert text_encoders(pipe) == [getattr(pipe, name) for name in names]


def weights_left(pipe, config):
    """Which components still have weights in memory after the encoders were freed, an adapter being there."""
    named = {"vae": pipe.vae, "denoiser": family_of(pipe).denoiser, "text": pipe.text_encoder}
    weights = {name: weakref.ref(next(module.parameters())) for name, module in named.items()}
    source = batches(config, pipe)
    before = source.loss(0)
    free_encoders(pipe, config)
    gc.collect()
    assert source.loss(0) == before
    return {name for name, weight in weights.items() if weight() is not None and weight().device.type != "meta"}


@FAMILIES
def test_freed_encoders_take_no_memory_and_the_losses_are_the_same(build):
    pipe, _ = adapted(build, **SMALL)
    assert weights_left(pipe, CONFIG) == {"denoiser"}
    assert pipe.vae is None
    assert text_encoders(pipe) == []


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ({"train_text_encoder": True}, {"denoiser", "text"}),
        ({"train_text_encoder": True, "text_encoders_to_train": ["text_encoder"]}, {"denoiser", "text"}),
        ({"cache": "none"}, {"denoiser", "text", "vae"}),
    ],
)
def test_encoders_that_run_in_each_step_are_not_freed(values, left):
    pipe, _ = adapted(text_encoders="train_text_encoder" in values, **SMALL)
    assert weights_left(pipe, CONFIG.replace(**values)) == left
    assert text_encoders(pipe)


# What the loss counts


def told(config, images=None, pipe=PIPE):
    """What the loss of the first batch is made of: the prediction and the target, both (batch, 4, 8, 8), in float64."""
    source = batches(config, pipe, images)
    found = {}
    plain = source._errors
    source._errors = lambda prediction, target, masks: (
        found.update(p=prediction, t=target) or plain(prediction, target, masks)
    )
    with torch.no_grad():
        loss = float(source.loss(0))
    return found["p"].double(), found["t"].double(), loss


def test_a_masked_loss_is_the_mean_over_what_the_mask_shows_and_follows_a_mirrored_image():
    half = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    half.paste(255, (0, 0, IMAGE_SIZE // 2, IMAGE_SIZE))
    image = replace(examples(1)[0], mask=half)
    sides = set()
    for seed in range(6):
        prediction, target, loss = told(TrainingConfig(random_flip=True, seed=seed), [image])
        errors = (prediction - target).square()
        left, right = float(errors[..., :4].mean()), float(errors[..., 4:].mean())
        assert loss == pytest.approx(left, rel=1e-5) or loss == pytest.approx(right, rel=1e-5)
        sides.add(loss == pytest.approx(left, rel=1e-5))
    assert sides == {True, False}


def test_an_image_without_a_mask_counts_whole_beside_one_with():
    image, other = examples(2)
    black = replace(image, mask=Image.new("L", (IMAGE_SIZE, IMAGE_SIZE)))
    prediction, target, loss = told(TrainingConfig(train_batch_size=2), [black, other])
    errors = (prediction - target).square().mean(dim=(1, 2, 3))
    assert min(abs(float(error) / 2 - loss) for error in errors) < 1e-5


def test_the_pseudo_huber_loss_is_quadratic_for_small_errors_and_linear_for_large_ones():
    c = 0.3
    prediction, target, loss = told(TrainingConfig(loss_type="huber", huber_c=c))
    expected = (2 * c * ((prediction - target).square() + c * c).sqrt() - 2 * c * c).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    *_, near = told(TrainingConfig(loss_type="huber", huber_c=100.0))
    assert near == pytest.approx(told(TrainingConfig())[2], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"timestep_shift": 1e-4}, 0.0, 0.2),
        ({"timestep_shift": 1e4}, 0.8, 1.0),
        (
            {"timestep_sampling": "logit_normal", "logit_mean": 0.0, "logit_std": 1e-6, "timestep_shift": 3.0},
            0.74,
            0.76,
        ),
    ],
)
def test_noise_levels_are_drawn_as_the_settings_say(options, least, most):
    _, times = heard(PIPE, batches(CONFIG.replace(**options)), range(3))
    assert least <= float(times.float().mean()) / 1000 <= most


def test_a_logit_normal_distributions_numbers_are_not_dropped_in_silence():
    for options in ({"logit_mean": 1.0}, {"logit_std": 0.5, "timestep_sampling": "mode"}):
        with pytest.raises(TrainingConfigError, match="used only with timestep_sampling: logit_normal"):
            batches(CONFIG.replace(**options))


def test_a_larger_image_of_a_base_without_a_shift_gets_more_noise_by_size():
    options = {"timestep_sampling": "logit_normal", "logit_std": 1e-6, "shift_by_size": True}
    large = prepare_images(pictures(1, (64, 64)), "a sks toy", ImagePlan(64))
    for images, expected in ((examples(1), 0.5), (large, 2 / 3)):  # a shift of 2 for four times the tokens
        _, times = heard(PIPE, batches(CONFIG.replace(**options), images=images), [0])
        assert float(times.float().mean()) / 1000 == pytest.approx(expected, abs=0.002)


def test_guidance_is_told_to_a_base_that_was_distilled_for_it():
    pipe = tiny_flux_pipeline()
    family = family_of(pipe)
    family.guidance = 2.5
    pipe.transformer.register_to_config(guidance_embeds=True)
    said = {}
    pipe.transformer.forward = lambda **kwargs: said.update(kwargs) or (kwargs["hidden_states"],)
    text = family.encode(["a toy"], torch.device("cpu"))
    family.predict(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), text, torch.zeros(2, 6))
    assert said["guidance"].tolist() == [2.5, 2.5]
