"""How much noise a training image gets: a random place between no noise and noise alone."""

from __future__ import annotations

import math

import torch

from .config import Sampling


def draw_place(
    kind: Sampling, generator: torch.Generator, *, mean: float = 0.0, std: float = 1.0, mode_scale: float = 1.29
) -> float:
    """A random number from 0, no noise, to 1, noise alone (Esser et al., 2024, section 3.1).

    Args:
        kind: "uniform"; "logit_normal" for the sigmoid of a normally distributed number; "mode" for one that is
            likeliest in the middle or at the ends.
        generator: where the randomness comes from; one number is drawn.
        mean: of the normally distributed number; above 0, noise is likelier.
        std: its standard deviation.
        mode_scale: above 0 for the middle, below 0 for the ends, 0 for a uniform number.
    """
    if kind == "logit_normal":
        return float(torch.sigmoid(mean + std * torch.randn((), generator=generator, dtype=torch.float64)))
    place = float(torch.rand((), generator=generator, dtype=torch.float64))
    if kind == "uniform":
        return place
    return 1 - place - mode_scale * (math.cos(math.pi / 2 * place) ** 2 - 1 + place)


def shifted(place: float, shift: float) -> float:
    """A place nearer to noise where the shift is above 1, which larger images need (Esser et al., equation 23)."""
    return shift * place / (1 + (shift - 1) * place)
