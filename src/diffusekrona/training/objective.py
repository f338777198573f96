"""What a denoiser is trained to say of noisy latents: the noise of a diffusion, or the velocity of a flow."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..errors import UnsupportedPipelineError
from .config import Sampling, Weighting
from .timesteps import shifted

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Objective(Protocol):
    """How much noise there may be, how it is added, and what is to be said of it.

    A noise level is a number of its own kind: a diffusion's timestep, or a flow's σ.
    """

    sampling: Sampling
    """How noise levels are drawn where no other way is asked for."""

    def level(self, place: float, shift: float) -> int | float:
        """The noise level at a place from 0, no noise, to 1, noise alone, shifted towards the noise."""

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Noisy latents; all are (batch, channels, height, width), the levels (batch)."""

    def timesteps(self, levels: Tensor) -> Tensor:
        """What the denoiser is told of the levels, (batch)."""

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the denoiser should say; shaped like the latents."""

    def weights(self, levels: Tensor) -> Tensor:
        """What the loss of each image counts, (batch), float32."""


def objective_of(
    scheduler: Any, device: torch.device, *, snr_gamma: float | None = None, weighting: Weighting = "none"
) -> Objective:
    """The objective that a pipeline's scheduler stands for.

    Args:
        scheduler: its configuration is read, and it is not changed.
        device: where the latents will be.
        snr_gamma: Min-SNR's γ, or None; a diffusion's.
        weighting: how a flow's noise levels count.

    Raises:
        UnsupportedPipelineError: the scheduler is neither a diffusion's, with β, nor a flow's; or what is asked for is
            the other's.
    """
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.get("use_flow_sigmas"):
        if snr_gamma is not None:
            raise UnsupportedPipelineError(
                "snr_gamma weights a diffusion's noise levels, and this base is a flow. "
                "Leave it out, or use loss_weighting."
            )
        return FlowMatching(scheduler, weighting)
    if weighting != "none":
        raise UnsupportedPipelineError(
            f"loss_weighting {weighting!r} weights a flow's noise levels, and this base is a diffusion. "
            "Leave it out, or use snr_gamma."
        )
    return Denoising(scheduler, snr_gamma, device)


class Denoising:
    """w_t · ‖D(z_t | c, t) − target‖², averaged, with z_t = √ᾱ_t · z + √(1 − ᾱ_t) · ε (Section 3.1, equation 1).

    The target is ε, √ᾱ_t · ε − √(1 − ᾱ_t) · z, or z, as the base predicts noise, velocity or the sample.
    Without γ every w_t is 1. With γ it is Min-SNR's: min(SNR_t, γ) for the sample, the same over SNR_t for
    noise, and over SNR_t + 1 for velocity, where SNR_t = ᾱ_t / (1 − ᾱ_t).

    Raises:
        UnsupportedPipelineError: the scheduler has no β (flow matching, EDM), or predicts something else.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None, device: torch.device) -> None:
        config = scheduler.config
        kind = config.get("prediction_type", "epsilon")
        if "beta_start" not in config or kind not in PREDICTION_TYPES:
            raise UnsupportedPipelineError(
                f"The base model's scheduler is a {type(scheduler).__name__} with prediction type {kind!r}. "
                f"Training needs one with β values that predicts {', '.join(PREDICTION_TYPES)}."
            )
        self._kind: str = kind
        self._scheduler = DDPMScheduler.from_config(config)
        self._levels: int = self._scheduler.config.num_train_timesteps
        alphas: Tensor = self._scheduler.alphas_cumprod.to(device)
        self.sampling: Sampling = "uniform"
        self._weights = None if snr_gamma is None else _min_snr_weights(alphas, snr_gamma, kind)

    def level(self, place: float, shift: float) -> int:
        """The timestep at that part of them."""
        return min(int(shifted(place, shift) * self._levels), self._levels - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """z_t for latents z and noise ε."""
        noisy: Tensor = self._scheduler.add_noise(latents, noise, levels)
        return noisy

    def timesteps(self, levels: Tensor) -> Tensor:
        """The levels themselves."""
        return levels

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """ε, the velocity, or the latents."""
        if self._kind == "epsilon":
            return noise
        if self._kind == "sample":
            return latents
        velocity: Tensor = self._scheduler.get_velocity(latents, noise, levels)
        return velocity

    def weights(self, levels: Tensor) -> Tensor:
        """Min-SNR's, or 1."""
        return torch.ones_like(levels, dtype=torch.float32) if self._weights is None else self._weights[levels]


class FlowMatching:
    """‖D(z_σ | c, σ) − (ε − z)‖², averaged, with z_σ = (1 − σ) · z + σ · ε (rectified flow; Esser et al., 2024).

    σ is the place of a noise level, shifted as the pipeline shifts it for an image of that size. The loss of a level
    counts 1, 1 / σ² ("sigma_sqrt"), or 2 / (π · (1 − 2σ + 2σ²)) ("cosmap"; Esser et al., section 3.1).
    """

    def __init__(self, scheduler: Any, weighting: Weighting) -> None:
        self.sampling: Sampling = "logit_normal"
        self._weighting = weighting
        self._timesteps: int = scheduler.config.num_train_timesteps

    def level(self, place: float, shift: float) -> float:
        """σ."""
        return shifted(place, shift)

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """z_σ for latents z and noise ε."""
        sigma = levels.view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def timesteps(self, levels: Tensor) -> Tensor:
        """σ in the scheduler's units, mostly thousandths."""
        return levels * self._timesteps

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """ε − z."""
        return noise - latents

    def weights(self, levels: Tensor) -> Tensor:
        """As the weighting says."""
        if self._weighting == "sigma_sqrt":
            return levels.float() ** -2
        if self._weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * levels.float() + 2 * levels.float() ** 2))
        return torch.ones_like(levels, dtype=torch.float32)


def _min_snr_weights(alphas: Tensor, gamma: float, kind: str) -> Tensor:
    """w_t for every timestep, (timesteps), float32."""
    snr = alphas.double() / (1 - alphas.double())
    if kind == "epsilon":
        # The same as min(snr, gamma) / snr, and still 1 at the last step of a schedule that ends at zero SNR.
        weights = (gamma / snr).clamp(max=1)
    elif kind == "v_prediction":
        weights = snr.clamp(max=gamma) / (snr + 1)
    else:
        weights = snr.clamp(max=gamma)
    return weights.float()
