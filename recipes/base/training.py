"""What every training stage shares: device, the budget that drives the learning rate, checkpoints, log."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from diffusekrona.bases.loading import config_in_float32

from .art import CACHE


def pick_device() -> torch.device:
    """The device named by the DEVICE variable, else CUDA where there is one, else the CPU."""
    return torch.device(os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


def mixed(device: torch.device) -> torch.autocast:
    """bfloat16 autocast, used on both kinds of device."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def note(event: str) -> None:
    """Print an event and append it, with the time of day, to the cache's PROGRESS.txt (first worker only)."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    line = f"{time.strftime('%H:%M:%S')} {event}"
    print(line, flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "PROGRESS.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


class Budget:
    """Training ends after `steps` steps or `minutes` minutes, whichever comes first.

    The learning rate falls along with the larger of the two fractions, so it reaches its floor at the end
    whichever limit ends the run. Minutes already spent survive a restart through `state`.
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.minutes = steps, minutes
        self.step = 0
        self.spent = 0.0
        self.began = time.monotonic()

    def elapsed(self) -> float:
        """Minutes of training so far, over all restarts."""
        return self.spent + (time.monotonic() - self.began) / 60

    def progress(self) -> float:
        """From 0 at the start to 1 at the end; workers take the first one's answer, to end together."""
        done = min(1.0, max(self.step / self.steps, self.elapsed() / self.minutes))
        if not dist.is_initialized():
            return done
        answer = torch.tensor(done, dtype=torch.float64)
        dist.broadcast(answer, src=0)
        return float(answer)

    def rate(self, done: float, peak: float, floor: float, warmup: int) -> float:
        """Learning rate at progress `done`: a linear warm-up, then a straight fall to `floor * peak`."""
        return peak * min(1.0, (self.step + 1) / warmup) * (1 - (1 - floor) * done)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"step": self.step, "minutes": self.elapsed()}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's `state`."""
        self.step, self.spent, self.began = int(state["step"]), float(state["minutes"]), time.monotonic()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint in one move, so that a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, or None before the first one."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Write a model in half precision; a plain `from_pretrained(folder)` gives it back in float32."""
    model.to(torch.float16).save_pretrained(folder)
    model.to(torch.float32)
    config = folder / "config.json"
    config.write_text(config_in_float32(config), encoding="utf-8")


def fit(
    name: str,
    budget: Budget,
    optimizer: torch.optim.Optimizer,
    one_step: Callable[[], torch.Tensor],
    checkpoint: Callable[[], None],
    schedule: tuple[float, float, int],
    every: int = 100,
    share: Callable[[], None] | None = None,
) -> None:
    """Run `one_step` (which returns the loss, not yet backpropagated) until the budget is spent.

    `schedule` is (peak learning rate, its final fraction, warm-up steps); every `every` steps the mean
    loss is noted, and a checkpoint is written at every fifth note and at the end. `share`, where given,
    runs between the backward pass and the update: workers average their gradients and their progress there.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total, first, since = 0.0, budget.step, time.monotonic()
    while (done := budget.progress()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = budget.rate(done, *schedule)
        loss = one_step()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if share is not None:
            share()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        budget.step += 1
        total += loss.item()
        if budget.step % every == 0:
            pace = (time.monotonic() - since) / (budget.step - first)
            mean, minutes = total / every, budget.elapsed()
            note(f"{name} step {budget.step} loss {mean:.4f} {pace:.3f} s/step {minutes:.1f} min")
            total, first, since = 0.0, budget.step, time.monotonic()
        if budget.step % (5 * every) == 0:
            checkpoint()
    checkpoint()


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the workers, in one exchange."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
