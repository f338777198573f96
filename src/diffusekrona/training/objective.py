"""What a denoiser is trained to say of noisy latents: the noise of a diffusion, or the velocity of a flow."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..errors import UnsupportedPipelineError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Objective(Protocol):
    """How much noise there may be, how it is added, and what is to be said of it. Noise levels are whole numbers."""

    def draw_level(self, generator: torch.Generator) -> int:
        """A random noise level."""

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Noisy latents; all are (batch, channels, height, width), the levels (batch)."""

    def timesteps(self, levels: Tensor) -> Tensor:
        """What the denoiser is told of the levels, (batch)."""

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The weighted mean squared error of each image, (batch), float32."""


def objective_of(scheduler: Any, snr_gamma: float | None, device: torch.device) -> Objective:
    """The objective that a pipeline's scheduler stands for.

    Args:
        scheduler: its configuration is read, and it is not changed.
        snr_gamma: Min-SNR's γ, or None.
        device: where the latents will be.

    Raises:
        UnsupportedPipelineError: the scheduler is neither a diffusion's, with β, nor a flow's.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatching(scheduler, snr_gamma, device)
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
        self._weights = None if snr_gamma is None else _min_snr_weights(alphas, snr_gamma, kind)

    def draw_level(self, generator: torch.Generator) -> int:
        """All levels are equally likely."""
        return int(torch.randint(self._levels, (), generator=generator))

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """z_t for latents z and noise ε."""
        noisy: Tensor = self._scheduler.add_noise(latents, noise, levels)
        return noisy

    def timesteps(self, levels: Tensor) -> Tensor:
        """The levels themselves."""
        return levels

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the UNet should have said; shaped like the latents."""
        if self._kind == "epsilon":
            return noise
        if self._kind == "sample":
            return latents
        velocity: Tensor = self._scheduler.get_velocity(latents, noise, levels)
        return velocity

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The weighted mean squared error of each image."""
        error = _squared_error(prediction, self.target(latents, noise, levels))
        return error if self._weights is None else self._weights[levels] * error


class FlowMatching:
    """‖D(z_σ | c, σ) − (ε − z)‖², averaged, with z_σ = (1 − σ) · z + σ · ε (rectified flow; Esser et al., 2024).

    The noise level is that of a place in the scheduler's own σ, its shift included; the place is the sigmoid of a
    normally distributed number, which is Esser et al.'s logit-normal density.

    Raises:
        UnsupportedPipelineError: γ is given, which needs a diffusion, or σ depends on the image's size.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None, device: torch.device) -> None:
        if snr_gamma is not None:
            raise UnsupportedPipelineError("snr_gamma weights a diffusion's noise levels; this base is a flow.")
        if scheduler.config.get("use_dynamic_shifting", False):
            raise UnsupportedPipelineError("The base's scheduler shifts noise levels by size, which is not supported.")
        fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self._timesteps: Tensor = fresh.timesteps.to(device)
        self._sigmas: Tensor = fresh.sigmas[: len(fresh.timesteps)].to(device, torch.float32)

    def draw_level(self, generator: torch.Generator) -> int:
        """A place in the scheduler's σ, logit-normally distributed."""
        place = torch.randn((), generator=generator).sigmoid()
        return min(int(place * len(self._sigmas)), len(self._sigmas) - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """z_σ for latents z and noise ε."""
        sigma = self._sigmas[levels].view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def timesteps(self, levels: Tensor) -> Tensor:
        """σ in the scheduler's units, thousandths."""
        return self._timesteps[levels]

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The mean squared error of each image's velocity."""
        return _squared_error(prediction, noise - latents)


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


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
