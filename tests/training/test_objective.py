import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_loss_weighting_for_sd3

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


def loss(goal, prediction, latents, noise, levels):
    """The weighted mean squared error of each image, as a batch has it."""
    target = goal.target(latents, noise, levels)
    return goal.weights(levels) * (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


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
    found = loss(goal, prediction, latents, noise, TIMESTEPS)
    for row, image in enumerate(goal.target(latents, noise, TIMESTEPS)):
        torch.testing.assert_close(found[row], torch.nn.functional.mse_loss(prediction[row], image))
    assert not loss(goal, goal.target(latents, noise, TIMESTEPS), latents, noise, TIMESTEPS).any()


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
    actual = loss(goal, prediction, latents, noise, TIMESTEPS)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=0)


@KINDS
def test_a_schedule_that_ends_in_pure_noise_stays_finite(kind):
    goal = objective(kind, 5.0, rescale_betas_zero_snr=True)
    latents, noise = tensors()
    last = torch.full((4,), 999)
    torch.testing.assert_close(goal.add_noise(latents, noise, last), noise, atol=1e-5, rtol=0)
    assert loss(goal, tensors(1)[0], latents, noise, last).isfinite().all()


def test_the_loss_is_taken_in_float32():
    assert objective("epsilon", 5.0).weights(TIMESTEPS).dtype == torch.float32


def test_the_inference_schedulers_settings_carry_over_and_it_is_left_alone():
    scheduler = EulerDiscreteScheduler(**BETAS, num_train_timesteps=500)
    before = dict(scheduler.config)
    goal = Denoising(scheduler, None, CPU)
    assert [goal.level(place, 1.0) for place in (0.0, 0.5, 0.999, 1.0)] == [0, 250, 499, 499]
    assert dict(scheduler.config) == before


@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerDiscreteScheduler(), DDPMScheduler.from_config({"prediction_type": "flow"})]
)
def test_other_schedulers_are_refused_by_name(scheduler):
    with pytest.raises(UnsupportedPipelineError, match=type(scheduler).__name__):
        Denoising(scheduler, None, CPU)


def test_a_shift_moves_a_diffusions_levels_towards_the_noise():
    goal = objective("epsilon")
    assert goal.level(0.5, 3.0) == 750
    assert [goal.level(place, 3.0) for place in (0.0, 1.0)] == [0, 999]


# Flow matching


LEVELS = torch.tensor([0.001, 0.25, 0.5, 1.0])


def flow(weighting="none", **config):
    return objective_of(FlowMatchEulerDiscreteScheduler(**config), CPU, weighting=weighting)


def test_a_flows_noisy_latents_lie_on_the_line_and_the_target_is_its_direction():
    latents, noise = tensors()
    goal = flow()
    sigma = LEVELS.double().view(-1, 1, 1, 1)
    noisy = goal.add_noise(latents, noise, LEVELS)
    torch.testing.assert_close(noisy.double(), (1 - sigma) * latents + sigma * noise, atol=1e-6, rtol=0)
    # From any point of the line, its direction leads to the clean latents and to the noise.
    direction = goal.target(latents, noise, LEVELS)
    torch.testing.assert_close((noisy - sigma * direction).float(), latents, atol=1e-5, rtol=0)
    torch.testing.assert_close((noisy + (1 - sigma) * direction).float(), noise, atol=1e-5, rtol=0)


def test_a_flow_is_told_its_noise_in_units_of_its_scheduler():
    assert flow().timesteps(LEVELS).tolist() == [1.0, 250.0, 500.0, 1000.0]
    assert flow(num_train_timesteps=100).timesteps(LEVELS).tolist() == pytest.approx([0.1, 25.0, 50.0, 100.0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_levels_are_those_that_its_scheduler_makes_of_places(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    places = torch.arange(1000, 0, -1) / 1000
    found = torch.tensor([flow().level(float(place), shift) for place in places])
    torch.testing.assert_close(found, scheduler.sigmas[:1000], atol=1e-6, rtol=0)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_a_flows_levels_weigh_as_in_diffusers(weighting):
    expected = compute_loss_weighting_for_sd3(weighting, LEVELS)
    torch.testing.assert_close(flow(weighting).weights(LEVELS), expected)


def test_solvers_of_flows_are_flows():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert isinstance(objective_of(scheduler, CPU), FlowMatching)


def test_what_only_the_other_kind_can_do_is_refused():
    with pytest.raises(UnsupportedPipelineError, match="snr_gamma"):
        objective_of(FlowMatchEulerDiscreteScheduler(), CPU, snr_gamma=5.0)
    with pytest.raises(UnsupportedPipelineError, match="loss_weighting 'cosmap'"):
        objective_of(DDIMScheduler(**BETAS), CPU, weighting="cosmap")


def test_the_scheduler_decides_which_objective_it_is():
    assert isinstance(flow(), FlowMatching)
    assert isinstance(objective_of(DDIMScheduler(**BETAS), CPU, snr_gamma=5.0), Denoising)
