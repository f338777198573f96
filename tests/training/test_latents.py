import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffusekrona.training.latents import LatentPosteriors
from tests.pipelines import IMAGE_SIZE, tiny_sd_pipeline


def pictures(count=3):
    noise = np.random.default_rng(0).integers(0, 255, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def reference(pipe, picture):
    """Mean and standard deviation as Diffusers' own image processor and autoencoder give them."""
    with torch.no_grad():
        posterior = pipe.vae.encode(pipe.image_processor.preprocess(picture)).latent_dist
    return posterior.mean[0], posterior.std[0]


def draws(posteriors, indices, count=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([posteriors.sample(indices, generator) for _ in range(count)])


def test_draws_have_the_posteriors_mean_and_spread():
    pipe = tiny_sd_pipeline()
    scale = pipe.vae.config.scaling_factor
    drawn = draws(LatentPosteriors(pipe.vae, pictures(), flip=False), [2, 0])
    for column, index in enumerate((2, 0)):
        mean, std = reference(pipe, pictures()[index])
        assert ((drawn[:, column].mean(0) - mean * scale) / (std * scale)).abs().max() < 6 / 400**0.5
        torch.testing.assert_close(drawn[:, column].std(0), std * scale, rtol=0.2, atol=0)


def test_latents_can_be_shifted_and_scaled_channel_by_channel():
    pipe = tiny_sd_pipeline()
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    drawn = draws(LatentPosteriors(pipe.vae, pictures(1), flip=False), [0])[:, 0]
    mean, std = reference(pipe, pictures(1)[0])
    shift, spread = torch.arange(1, 5).view(4, 1, 1) / 10, torch.arange(1.0, 5.0).view(4, 1, 1)
    factor = pipe.vae.config.scaling_factor / spread
    assert ((drawn.mean(0) - (mean - shift) * factor) / (std * factor)).abs().max() < 6 / 400**0.5


def test_flipping_shows_each_image_either_way_and_half_of_the_time():
    pipe = tiny_sd_pipeline()
    picture = pictures(1)[0]
    posteriors = LatentPosteriors(pipe.vae, [picture], flip=True)
    scale = pipe.vae.config.scaling_factor
    ways = [reference(pipe, view)[0] * scale for view in (picture, ImageOps.mirror(picture))]
    nearest = [int((draw - ways[0]).norm() > (draw - ways[1]).norm()) for draw in draws(posteriors, [0], 200)[:, 0]]
    assert 60 < sum(nearest) < 140


@pytest.mark.parametrize(("flip", "runs"), [(False, 3), (True, 6)])
def test_the_autoencoder_runs_once_per_view(flip, runs):
    pipe, count = tiny_sd_pipeline(), []
    pipe.vae.encoder.register_forward_hook(lambda *_: count.append(1))
    posteriors = LatentPosteriors(pipe.vae, pictures(), flip=flip)
    draws(posteriors, [0, 1, 2], 5)
    assert len(count) == runs


def test_a_half_precision_autoencoder_is_run_in_float32_and_left_as_it_was():
    pipe = tiny_sd_pipeline()
    pipe.vae.half()
    before = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    used = []
    pipe.vae.encoder.register_forward_hook(lambda module, args, output: used.append(output.dtype))
    drawn = draws(LatentPosteriors(pipe.vae, pictures(), flip=False), [0], 1)
    assert set(used) == {torch.float32}
    assert drawn.dtype == torch.float32
    for name, tensor in pipe.vae.state_dict().items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, before[name])


def test_the_same_seed_draws_the_same_latents():
    posteriors = LatentPosteriors(tiny_sd_pipeline().vae, pictures(), flip=True)
    assert torch.equal(draws(posteriors, [0, 1], 3), draws(posteriors, [0, 1], 3))
    assert not torch.equal(draws(posteriors, [0, 1], 3), draws(posteriors, [0, 1], 3, seed=1))
