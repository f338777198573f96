"""What a run borrows and gives back: accelerate's process state, the random state, the modules' modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from torch import nn

from .errors import TrainingConfigError


@contextmanager
def accelerator_for(mixed_precision: str) -> Iterator[Accelerator]:
    """An `Accelerator` for one run in one process.

    Raises:
        TrainingConfigError: the device cannot compute in this precision, the process already has an
            accelerator of another precision, or there is more than one process.
    """
    ours = not is_initialized()
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:
        _forget(ours)
        raise TrainingConfigError(f"mixed_precision={mixed_precision!r} is not possible here: {error}") from error
    try:
        if mixed_precision == "fp16" and accelerator.scaler is None:
            raise TrainingConfigError(
                f"mixed_precision='fp16' needs a GPU, and this is {accelerator.device}; use 'bf16' or 'no'."
            )
        if accelerator.num_processes > 1:
            raise TrainingConfigError(
                f"Training runs in one process, not {accelerator.num_processes}; start it without a launcher."
            )
        yield accelerator
    finally:
        _forget(ours)


def _forget(ours: bool) -> None:
    # accelerate keeps one state per process and refuses a second precision, which would forbid a second run.
    if ours:
        AcceleratorState._reset_state()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """Seed torch's global random state and give the caller's back afterwards.

    Yields:
        a generator on the CPU, so that what is drawn from it is the same on every device.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


@contextmanager
def modes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give every submodule its train or eval mode back afterwards."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
