"""The denoising objective of Section 3.1, equation 1: noise the latents, score what the UNet says of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from .errors import UnsupportedPipelineError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class DenoisingObjective:
    """w_t · ‖D(z_t | c, t) − target‖², averaged, with z_t = √ᾱ_t · z + √(1 − ᾱ_t) · ε.

    The target is ε, √ᾱ_t · ε − √(1 − ᾱ_t) · z, or z, as the base predicts noise, velocity or the sample.
    Without γ every w_t is 1. With γ it is Min-SNR's: min(SNR_t, γ) for the sample, the same over SNR_t for
    noise, and over SNR_t + 1 for velocity, where SNR_t = ᾱ_t / (1 − ᾱ_t).

    Args:
        scheduler: the pipeline's scheduler; its configuration is read, and it is not changed.
        snr_gamma: Min-SNR's γ, or None.
        device: where the latents will be.

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
        self.timesteps: int = self._scheduler.config.num_train_timesteps
        alphas: Tensor = self._scheduler.alphas_cumprod.to(device)
        self._weights = None if snr_gamma is None else _min_snr_weights(alphas, snr_gamma, kind)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t for latents z and noise ε, both (batch, channels, height, width), at timesteps t (batch)."""
        noisy: Tensor = self._scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should have said; shaped like the latents."""
        if self._kind == "epsilon":
            return noise
        if self._kind == "sample":
            return latents
        velocity: Tensor = self._scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The weighted mean squared error over a batch, a float32 scalar."""
        error = prediction.float() - self.target(latents, noise, timesteps).float()
        if self._weights is None:
            return error.square().mean()
        return (self._weights[timesteps] * error.square().mean(dim=(1, 2, 3))).mean()


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
