"""What a run borrows and gives back: accelerate's process state, the random state, the modules' modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import nn

from .errors import TrainingConfigError

_REPLICATED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_MLU,
)
"""Each process has the whole model."""


@contextmanager
def accelerator_for(mixed_precision: str) -> Iterator[Accelerator]:
    """An `Accelerator` for one run.

    Raises:
        TrainingConfigError: the device cannot compute in this precision, the process already has an
            accelerator of another precision, or accelerate is set up to split the model over processes.
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
        if accelerator.distributed_type not in _REPLICATED:
            raise TrainingConfigError(
                f"accelerate is set up for {accelerator.distributed_type.value}, which splits a model over processes; "
                "this trainer keeps a whole one in each. Start it with `accelerate launch --multi_gpu` or without."
            )
        yield accelerator
    finally:
        _forget(ours)


def _forget(ours: bool) -> None:
    # accelerate keeps one state per process and refuses a second precision, which would forbid a second run.
    if ours:
        AcceleratorState._reset_state()


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Give torch's global random state back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global random state and give the caller's back afterwards."""
    with random_state_kept(device):
        torch.manual_seed(seed)
        yield


@contextmanager
def modes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give every submodule its train or eval mode back afterwards."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def checkpointed(modules: Iterable[Any]) -> Iterator[None]:
    """Let models of Diffusers and transformers recompute their activations in the backward pass."""
    switched = [module for module in modules if not module.is_gradient_checkpointing]
    try:
        for module in switched:
            if hasattr(module, "enable_gradient_checkpointing"):
                module.enable_gradient_checkpointing()
            else:
                module.gradient_checkpointing_enable({"use_reentrant": False})
        yield
    finally:
        for module in switched:
            if hasattr(module, "disable_gradient_checkpointing"):
                module.disable_gradient_checkpointing()
            else:
                module.gradient_checkpointing_disable()
