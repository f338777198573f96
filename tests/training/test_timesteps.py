import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from diffusekrona.training.timesteps import draw_place, shifted

COUNT = 5000


def drawn(kind, **options):
    generator = torch.Generator().manual_seed(0)
    return np.array([draw_place(kind, generator, **options) for _ in range(COUNT)])


def same_distribution(ours, theirs):
    """Whether two samples could be of one distribution (Kolmogorov and Smirnov), but for one time in 10,000."""
    grid = np.linspace(0, 1, 201)
    distance = np.abs([np.mean(ours <= x) - np.mean(theirs <= x) for x in grid]).max()
    return distance < 2.23 * (2 / COUNT) ** 0.5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("uniform", {}),
        ("logit_normal", {}),
        ("logit_normal", {"mean": 0.7, "std": 0.5}),
        ("mode", {"mode_scale": 1.29}),
        ("mode", {"mode_scale": -0.8}),
    ],
)
def test_places_are_distributed_as_in_diffusers(kind, options):
    names = {"mean": "logit_mean", "std": "logit_std"}
    theirs = compute_density_for_timestep_sampling(
        kind if kind != "uniform" else "none",
        COUNT,
        **{"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
        | {names.get(name, name): value for name, value in options.items()},
        generator=torch.Generator().manual_seed(1),
    ).numpy()
    assert same_distribution(drawn(kind, **options), theirs)
    assert not same_distribution(drawn(kind, **options) ** 1.5, theirs)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode"])
def test_places_are_between_no_noise_and_noise_alone(kind):
    places = drawn(kind)
    assert places.min() >= 0
    assert places.max() <= 1


def test_a_positive_mean_makes_noise_likelier():
    assert drawn("logit_normal", mean=1.0).mean() > 0.6


def test_a_shift_is_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for place in (0.001, 0.3, 1.0):
        index = round((1 - place) * 1000)
        assert shifted(place, 3.0) == pytest.approx(float(scheduler.sigmas[index]), rel=1e-5)
