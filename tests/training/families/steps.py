"""A step of the trainer beside that of another program, on the same latents, noise, timesteps and adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusekrona import KronAConfig, inject_krona
from diffusekrona.training.batches import text_encoders
from diffusekrona.training.encoding import Texts
from diffusekrona.training.families import family_of
from diffusekrona.training.objective import objective_of

CPU = torch.device("cpu")
PROMPTS = ("a sks toy on a beach, at dawn", "a toy")
"""Of different lengths."""


class Step:
    """Two images of an adapted pipeline, more wide than high, with different prompts and noise levels.

    Attributes:
        pipe: has an adapter in its denoiser, with random factors.
        latents: (2, channels, height, width).
        noise: shaped like them.
        timesteps: in thousandths, (2).
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str] = PROMPTS,
        timesteps: Sequence[int] = (250, 813),
        size: tuple[int, int] = (32, 64),
    ) -> None:
        self.pipe, self.prompts, self.timesteps = pipe, list(prompts), torch.tensor(timesteps)
        self.krona = inject_krona(pipe, KronAConfig(a1=4, a2=8))
        self.family = family_of(pipe)
        generator = torch.Generator().manual_seed(0)
        for factor in self.krona.parameters():
            factor.data = 0.1 * torch.randn(factor.shape, generator=generator)
        shape = (2, *self.family.latent_shape(*size))
        self.latents, self.noise = (torch.randn(shape, generator=generator) for _ in range(2))

    def loss(self) -> Tensor:
        """The trainer's."""
        goal = objective_of(self.pipe.scheduler, CPU)
        levels = self.timesteps / 1000 if goal.sampling == "logit_normal" else self.timesteps
        texts = Texts(self.family, self.prompts, text_encoders(self.pipe), trained=False, device=CPU)
        noisy = goal.add_noise(self.latents, self.noise, levels)
        said = self.family.predict(noisy, goal.timesteps(levels), texts(self.prompts), torch.zeros(2, 6))
        return (said - goal.target(self.latents, self.noise, levels)).square().mean()

    def gradients(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """A loss, and its gradients by the names of the factors that it reaches."""
        for factor in self.krona.parameters():
            factor.grad = None
        found = loss()
        found.backward()
        given = {name: factor.grad.clone() for name, factor in self.krona.named_parameters() if factor.grad is not None}
        return {"loss": found.detach(), **given}

    def is_that_of(self, theirs: Callable[[Step], Tensor]) -> None:
        """Assert that loss and gradients are those of another way to compute the loss, up to rounding."""
        ours, expected = self.gradients(self.loss), self.gradients(lambda: theirs(self))
        assert ours.keys() == expected.keys()
        assert max(tensor.abs().max() for name, tensor in ours.items() if name != "loss") > 1e-5
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-4)


def shifts_as_its_pipeline(pipe: Any, size: tuple[int, int]) -> bool:
    """Whether a flow's family shifts noise levels as its pipeline does that draws an image of that height and width."""
    family = family_of(pipe)
    pipe("a toy", num_inference_steps=4, height=size[0], width=size[1], output_type="latent")
    ours = objective_of(pipe.scheduler, CPU).level(0.75, family.shift(family.tokens(*size)))
    return abs(ours - float(pipe.scheduler.sigmas[1])) < 1e-6
