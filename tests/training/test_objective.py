import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffusekrona.training import UnsupportedPipelineError
from diffusekrona.training.objective import DenoisingObjective

CPU = torch.device("cpu")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
TIMESTEPS = torch.tensor([0, 10, 500, 999])


def alphas():
    """ᾱ of the scaled linear schedule, from its definition, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)[TIMESTEPS].view(-1, 1, 1, 1)


def objective(kind, gamma=None, **config):
    return DenoisingObjective(DDIMScheduler(**BETAS, prediction_type=kind, **config), gamma, CPU)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2)]


def test_noise_is_mixed_in_as_the_schedule_says():
    latents, noise = tensors()
    expected = alphas().sqrt() * latents + (1 - alphas()).sqrt() * noise
    torch.testing.assert_close(
        objective("epsilon").add_noise(latents, noise, TIMESTEPS), expected.float(), atol=1e-5, rtol=0
    )


@KINDS
def test_the_target_with_the_noisy_latents_gives_the_clean_ones_back(kind):
    latents, noise = tensors()
    goal = objective(kind)
    noisy, target = goal.add_noise(latents, noise, TIMESTEPS), goal.target(latents, noise, TIMESTEPS)
    alpha, sigma = alphas().sqrt(), (1 - alphas()).sqrt()
    clean = {
        "epsilon": lambda: (noisy - sigma * target) / alpha,
        "v_prediction": lambda: alpha * noisy - sigma * target,
        "sample": lambda: target,
    }[kind]()
    torch.testing.assert_close(clean.float(), latents, atol=1e-4, rtol=0)


@KINDS
def test_without_gamma_the_loss_is_the_plain_mean_squared_error(kind):
    latents, noise = tensors()
    goal = objective(kind)
    prediction = tensors(1)[0]
    expected = torch.nn.functional.mse_loss(prediction, goal.target(latents, noise, TIMESTEPS))
    torch.testing.assert_close(goal.loss(prediction, latents, noise, TIMESTEPS), expected)
    assert goal.loss(goal.target(latents, noise, TIMESTEPS), latents, noise, TIMESTEPS) == 0


@KINDS
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weighs_an_error_in_the_clean_latents_by_min_snr_gamma(kind, gamma):
    latents, noise = tensors()
    error = tensors(1)[0]
    goal = objective(kind, gamma)
    alpha, sigma = alphas().sqrt(), (1 - alphas()).sqrt()
    # What one and the same error of the clean latents is in the terms of each prediction.
    factors = {"epsilon": -alpha / sigma, "v_prediction": -1 / sigma, "sample": torch.ones_like(alpha)}
    snr = (alphas() / (1 - alphas())).flatten()
    expected = (snr.clamp(max=gamma) * error.double().square().mean(dim=(1, 2, 3))).mean()
    prediction = goal.target(latents, noise, TIMESTEPS) + factors[kind] * error
    actual = goal.loss(prediction, latents, noise, TIMESTEPS)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=0)


@KINDS
def test_a_schedule_that_ends_in_pure_noise_stays_finite(kind):
    goal = objective(kind, 5.0, rescale_betas_zero_snr=True)
    latents, noise = tensors()
    last = torch.full((4,), 999)
    torch.testing.assert_close(goal.add_noise(latents, noise, last), noise, atol=1e-5, rtol=0)
    assert goal.loss(tensors(1)[0], latents, noise, last).isfinite()


def test_the_loss_is_taken_in_float32():
    latents, noise = tensors()
    loss = objective("epsilon", 5.0).loss(tensors(1)[0].half(), latents, noise, TIMESTEPS)
    assert loss.dtype == torch.float32


def test_the_inference_schedulers_settings_carry_over_and_it_is_left_alone():
    scheduler = EulerDiscreteScheduler(**BETAS, num_train_timesteps=500)
    before = dict(scheduler.config)
    assert DenoisingObjective(scheduler, None, CPU).timesteps == 500
    assert dict(scheduler.config) == before


@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerDiscreteScheduler(), DDPMScheduler.from_config({"prediction_type": "flow"})]
)
def test_other_schedulers_are_refused_by_name(scheduler):
    with pytest.raises(UnsupportedPipelineError, match=type(scheduler).__name__):
        DenoisingObjective(scheduler, None, CPU)
