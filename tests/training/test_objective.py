import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffusekrona.training import UnsupportedPipelineError
from diffusekrona.training.objective import Denoising, FlowMatching, objective_of

CPU = torch.device("cpu")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
TIMESTEPS = torch.tensor([0, 10, 500, 999])


def alphas():
    """ᾱ of the scaled linear schedule, from its definition, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)[TIMESTEPS].view(-1, 1, 1, 1)


def objective(kind, gamma=None, **config):
    return Denoising(DDIMScheduler(**BETAS, prediction_type=kind, **config), gamma, CPU)


def levels_drawn(goal, count=2000):
    generator = torch.Generator().manual_seed(0)
    return [goal.draw_level(generator) for _ in range(count)]


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
    found = goal.loss(prediction, latents, noise, TIMESTEPS)
    for row, image in enumerate(goal.target(latents, noise, TIMESTEPS)):
        torch.testing.assert_close(found[row], torch.nn.functional.mse_loss(prediction[row], image))
    assert not goal.loss(goal.target(latents, noise, TIMESTEPS), latents, noise, TIMESTEPS).any()


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
    expected = snr.clamp(max=gamma) * error.double().square().mean(dim=(1, 2, 3))
    prediction = goal.target(latents, noise, TIMESTEPS) + factors[kind] * error
    actual = goal.loss(prediction, latents, noise, TIMESTEPS)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=0)


@KINDS
def test_a_schedule_that_ends_in_pure_noise_stays_finite(kind):
    goal = objective(kind, 5.0, rescale_betas_zero_snr=True)
    latents, noise = tensors()
    last = torch.full((4,), 999)
    torch.testing.assert_close(goal.add_noise(latents, noise, last), noise, atol=1e-5, rtol=0)
    assert goal.loss(tensors(1)[0], latents, noise, last).isfinite().all()


def test_the_loss_is_taken_in_float32():
    latents, noise = tensors()
    loss = objective("epsilon", 5.0).loss(tensors(1)[0].half(), latents, noise, TIMESTEPS)
    assert loss.dtype == torch.float32


def test_the_inference_schedulers_settings_carry_over_and_it_is_left_alone():
    scheduler = EulerDiscreteScheduler(**BETAS, num_train_timesteps=500)
    before = dict(scheduler.config)
    assert max(levels_drawn(Denoising(scheduler, None, CPU))) < 500
    assert dict(scheduler.config) == before


@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerDiscreteScheduler(), DDPMScheduler.from_config({"prediction_type": "flow"})]
)
def test_other_schedulers_are_refused_by_name(scheduler):
    with pytest.raises(UnsupportedPipelineError, match=type(scheduler).__name__):
        Denoising(scheduler, None, CPU)


def test_all_noise_levels_of_a_diffusion_are_equally_likely():
    levels = torch.tensor(levels_drawn(objective("epsilon"), 5000))
    assert levels.min() >= 0
    assert levels.max() <= 999
    tenths = torch.bincount(levels // 100, minlength=10)
    assert (tenths - 500).abs().max() < 5 * 500**0.5


# Flow matching


def flow(shift=1.0, **config):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **config)
    return scheduler, objective_of(scheduler, None, CPU)


def sigmas(shift):
    """σ of each level, from 1 down, shifted as Esser et al. do, in float64."""
    plain = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    return shift * plain / (1 + (shift - 1) * plain)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_noisy_latents_lie_on_the_line_and_the_target_is_its_direction(shift):
    latents, noise = tensors()
    _, goal = flow(shift)
    sigma = sigmas(shift)[TIMESTEPS].view(-1, 1, 1, 1)
    noisy = goal.add_noise(latents, noise, TIMESTEPS)
    torch.testing.assert_close(noisy.double(), (1 - sigma) * latents + sigma * noise, atol=1e-5, rtol=0)
    # From any point of the line, its direction leads to the clean latents and to the noise.
    direction = noise - latents
    torch.testing.assert_close((noisy - sigma * direction).float(), latents, atol=1e-5, rtol=0)
    prediction = tensors(1)[0]
    expected = (prediction - direction).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(goal.loss(prediction, latents, noise, TIMESTEPS), expected)
    assert not goal.loss(direction, latents, noise, TIMESTEPS).any()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_told_its_noise_in_thousandths(shift):
    _, goal = flow(shift)
    torch.testing.assert_close(goal.timesteps(TIMESTEPS).double(), 1000 * sigmas(shift)[TIMESTEPS], rtol=1e-5, atol=0)


def test_the_places_of_a_flows_levels_are_logit_normal():
    _, goal = flow()
    places = (torch.tensor(levels_drawn(goal, 5000)).double() + 0.5) / 1000
    logits = (places / (1 - places)).log()
    assert abs(logits.mean()) < 5 / 5000**0.5
    assert abs(logits.std() - 1) < 5 / (2 * 5000) ** 0.5
    # Normally distributed: as many within one standard deviation as should be.
    assert abs((logits.abs() < 1).double().mean() - 0.6827) < 0.04


def test_a_flows_scheduler_is_read_and_left_alone():
    scheduler, _ = flow(3.0)
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.clone()
    goal = objective_of(scheduler, None, CPU)
    assert goal.timesteps(torch.tensor([999])) < 10
    assert torch.equal(scheduler.timesteps, before)


def test_what_a_flow_cannot_do_is_refused():
    with pytest.raises(UnsupportedPipelineError, match="snr_gamma"):
        objective_of(FlowMatchEulerDiscreteScheduler(), 5.0, CPU)
    with pytest.raises(UnsupportedPipelineError, match="by size"):
        flow(use_dynamic_shifting=True)


def test_the_scheduler_decides_which_objective_it_is():
    assert isinstance(flow()[1], FlowMatching)
    assert isinstance(objective_of(DDIMScheduler(**BETAS), 5.0, CPU), Denoising)
