import pytest
import torch
from PIL import Image, ImageOps

from diffusekrona.training.encoding import LatentPosteriors
from diffusekrona.training.families import family_of
from tests.pipelines import tiny_sd_pipeline
from tests.training.runs import pictures

CPU = torch.device("cpu")


def reference(pipe, picture):
    """Mean and standard deviation as Diffusers' own image processor and autoencoder give them."""
    with torch.no_grad():
        posterior = pipe.vae.encode(pipe.image_processor.preprocess(picture)).latent_dist
    return posterior.mean[0], posterior.std[0]


def latents(pipe, images, flip=False, **options):
    return LatentPosteriors(family_of(pipe), images, flip=flip, device=CPU, **options)


def draws(posteriors, index, count=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([posteriors.sample(index, generator)[0] for _ in range(count)])


def test_draws_have_the_posteriors_mean_and_spread():
    pipe = tiny_sd_pipeline()
    scale = pipe.vae.config.scaling_factor
    posteriors = latents(pipe, pictures())
    for index in (2, 0):
        drawn = draws(posteriors, index)
        mean, std = reference(pipe, pictures()[index])
        assert ((drawn.mean(0) - mean * scale) / (std * scale)).abs().max() < 6 / 400**0.5
        torch.testing.assert_close(drawn.std(0), std * scale, rtol=0.2, atol=0)


def test_latents_can_be_shifted_and_scaled_channel_by_channel():
    pipe = tiny_sd_pipeline()
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    drawn = draws(latents(pipe, pictures(1)), 0)
    mean, std = reference(pipe, pictures(1)[0])
    shift, spread = torch.arange(1, 5).view(4, 1, 1) / 10, torch.arange(1.0, 5.0).view(4, 1, 1)
    factor = pipe.vae.config.scaling_factor / spread
    assert ((drawn.mean(0) - (mean - shift) * factor) / (std * factor)).abs().max() < 6 / 400**0.5


def test_flipping_shows_each_image_either_way_and_half_of_the_time():
    pipe = tiny_sd_pipeline()
    picture = pictures(1)[0]
    posteriors = latents(pipe, [picture], flip=True)
    scale = pipe.vae.config.scaling_factor
    ways = [reference(pipe, view)[0] * scale for view in (picture, ImageOps.mirror(picture))]
    nearest = [int((draw - ways[0]).norm() > (draw - ways[1]).norm()) for draw in draws(posteriors, 0, 200)]
    assert 60 < sum(nearest) < 140


@pytest.mark.parametrize(("flip", "runs"), [(False, 3), (True, 6)])
def test_the_autoencoder_runs_once_per_view(flip, runs):
    pipe, count = tiny_sd_pipeline(), []
    pipe.vae.encoder.register_forward_hook(lambda *_: count.append(1))
    posteriors = latents(pipe, pictures(), flip=flip)
    for index in (0, 1, 2):
        draws(posteriors, index, 5)
    assert len(count) == runs


def test_a_half_precision_autoencoder_is_run_in_float32_and_left_as_it_was():
    pipe = tiny_sd_pipeline()
    pipe.vae.half()
    before = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    used = []
    pipe.vae.encoder.register_forward_hook(lambda module, args, output: used.append(output.dtype))
    drawn = draws(latents(pipe, pictures()), 0, 1)
    assert set(used) == {torch.float32}
    assert drawn.dtype == torch.float32
    for name, tensor in pipe.vae.state_dict().items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, before[name])


def test_the_same_seed_draws_the_same_latents():
    posteriors = latents(tiny_sd_pipeline(), pictures(), flip=True)
    assert torch.equal(draws(posteriors, 1, 3), draws(posteriors, 1, 3))
    assert not torch.equal(draws(posteriors, 1, 3), draws(posteriors, 1, 3, seed=1))


def test_a_shift_is_taken_off_before_scaling():
    pipe = tiny_sd_pipeline()
    pipe.vae.register_to_config(shift_factor=0.3)
    drawn = draws(latents(pipe, pictures(1)), 0)
    mean, std = reference(pipe, pictures(1)[0])
    scale = pipe.vae.config.scaling_factor
    assert ((drawn.mean(0) - (mean - 0.3) * scale) / (std * scale)).abs().max() < 6 / 400**0.5


def test_kept_in_memory_on_disk_or_nowhere_latents_are_the_same_bits(tmp_path):
    found = []
    for keep in ("memory", "disk", "none"):
        posteriors = latents(tiny_sd_pipeline(), pictures(), flip=True, keep=keep, folder=tmp_path)
        found.append(torch.cat([draws(posteriors, index, 3) for index in (2, 0, 1)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def other_weights(pipe):
    next(pipe.vae.parameters()).data += 0.01


def other_scale(pipe):
    pipe.vae.register_to_config(scaling_factor=0.5)


@pytest.mark.parametrize(("change", "runs"), [(lambda pipe: None, 0), (other_weights, 3), (other_scale, 3)])
def test_on_disk_latents_are_found_again_unless_the_autoencoder_is_another(tmp_path, change, runs):
    draws(latents(tiny_sd_pipeline(), pictures(), keep="disk", folder=tmp_path), 0, 1)
    pipe, count = tiny_sd_pipeline(), []
    pipe.vae.encoder.register_forward_hook(lambda *_: count.append(1))
    change(pipe)
    again = draws(latents(pipe, pictures(), keep="disk", folder=tmp_path), 0, 1)
    assert len(count) == runs
    assert torch.equal(again, draws(latents(pipe, pictures()), 0, 1))


def test_images_of_the_same_pixels_in_another_shape_are_told_apart_on_disk(tmp_path):
    wide, tall = Image.new("RGB", (64, 16), "red"), Image.new("RGB", (16, 64), "red")
    posteriors = latents(tiny_sd_pipeline(), [wide, tall], keep="disk", folder=tmp_path)
    assert [draws(posteriors, index, 1).shape[2:] for index in (0, 1)] == [(4, 16), (16, 4)]
