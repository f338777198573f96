"""What every training stage shares: device, schedule, checkpoints that a kill cannot break, log.

A step draws all its random numbers from a seed of its own, so a run that was killed goes on as if it had not been.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .art import CACHE

MINUTES = 5.0  # between checkpoints
WORKER_SEEDS = 1_000_003
State = dict[str, Any]


def pick_device() -> torch.device:
    """The device named by the DEVICE variable, else CUDA where there is one, else the CPU."""
    return torch.device(os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


def worker() -> tuple[int, int]:
    """This worker's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mixed(device: torch.device) -> torch.autocast:
    """bfloat16 autocast, used on both kinds of device."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def note(event: str) -> None:
    """Print an event and append it, with the time of day, to the cache's PROGRESS.txt (first worker only)."""
    if worker()[0] > 0:
        return
    line = f"{time.strftime('%H:%M:%S')} {event}"
    print(line, flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "PROGRESS.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def random_of(step: int) -> np.random.Generator:
    """The random generator of one step of this worker; torch's own is seeded likewise."""
    seed = step + WORKER_SEEDS * worker()[0]
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint in one move, so that a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path) -> State | None:
    """The checkpoint at `path`, or None before the first one."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


class Average:
    """A running mean of a network's weights; it starts short and grows to the last `1 / (1 - decay)` steps."""

    def __init__(self, parts: Mapping[str, nn.Module], decay: float) -> None:
        self.parts, self.decay = parts, decay
        self.means = {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, part in self.parts.items():
            torch._foreach_lerp_(self.means[name], [p.detach() for p in part.parameters()], share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the networks' weights with their means; a second call takes it back."""
        for name, part in self.parts.items():
            for mean, weight in zip(self.means[name], part.parameters(), strict=True):
                kept = mean.clone()
                mean.copy_(weight)
                weight.copy_(kept)


class Run:
    """The training of some networks to a number of steps, with one checkpoint file.

    Args:
        name: of the checkpoint, and in the log.
        parts: the networks by name.
        steps: when it ends.
        schedule: peak learning rate, its fraction at the end, steps of warming up.
        decay: of the weights' running mean.
        weight_decay: of AdamW.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[str, nn.Module],
        steps: int,
        schedule: tuple[float, float, int],
        decay: float = 0.999,
        weight_decay: float = 0.01,
    ) -> None:
        self.name, self.parts, self.steps, self.schedule = name, dict(parts), steps, schedule
        self.weights = [p for part in self.parts.values() for p in part.parameters() if p.requires_grad]
        self.average = Average(self.parts, decay)
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=schedule[0], weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
        )
        self.step, self.minutes = 0, 0.0
        if state := load_checkpoint(self.path):
            for part, module in self.parts.items():
                module.load_state_dict(state["parts"][part])
            self.optimizer.load_state_dict(state["optimizer"])
            for part, means in state["means"].items():
                for mean, kept in zip(self.average.means[part], means, strict=True):
                    mean.copy_(kept)
            self.step, self.minutes = state["step"], state["minutes"]

    @property
    def path(self) -> Path:
        """The checkpoint's file."""
        return CACHE / f"{self.name}.pt"

    def save(self) -> None:
        """Write the checkpoint (first worker only)."""
        if worker()[0] == 0:
            state = {
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
                "means": self.average.means,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "minutes": self.minutes,
            }
            save_checkpoint(self.path, state)

    def rate(self) -> float:
        """Learning rate of the next step: a linear warm-up, then a straight fall."""
        peak, floor, warmup = self.schedule
        return peak * min(1.0, (self.step + 1) / warmup) * (1 - (1 - floor) * self.step / self.steps)

    def fit(
        self,
        loss_at: Callable[[np.random.Generator], Tensor],
        look: Callable[[], None] | None = None,
        every: int = 50,
        look_every: int = 500,
    ) -> None:
        """Train to the end.

        `loss_at` returns the loss of one step from its random numbers. Every `every` steps the mean loss is noted, and
        every `look_every` steps `look` is called with the mean weights in place.
        """
        total, since, noted, saved = 0.0, time.monotonic(), self.step, time.monotonic()
        while self.step < self.steps:
            began = time.monotonic()
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            loss = loss_at(random_of(self.step))
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if worker()[1] > 1:
                average_gradients(self.weights)
            nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.average.update(self.step)
            self.step += 1
            self.minutes += (time.monotonic() - began) / 60
            total += loss.item()
            if self.step % every == 0:
                pace = (time.monotonic() - since) / (self.step - noted)
                note(f"{self.name} step {self.step} loss {total / (self.step - noted):.4f} {pace:.3f} s/step")
                total, since, noted = 0.0, time.monotonic(), self.step
            if look is not None and worker()[0] == 0 and self.step % look_every == 0:
                self.average.swap()
                look()
                self.average.swap()
            if time.monotonic() - saved > 60 * MINUTES:
                self.save()
                saved = time.monotonic()
        self.save()
        note(f"{self.name} done: {self.step} steps, {self.minutes:.0f} min")

    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.steps


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the workers, in one exchange."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))
