"""What a run borrows and gives back: accelerate's process state, the random state, the modules' modes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from torch import nn
from torch.distributed.fsdp import ShardingStrategy

from ..errors import TrainingConfigError
from ..tuner.compat import forget_accelerator_state, parse_flag_from_env
from .zero import deepspeed_as_fsdp

_POSSIBLE = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_MLU,
    DistributedType.FSDP,
)
"""Each process has the whole model, or `sharded` splits it."""


def this_process() -> PartialState:
    """accelerate's state of this process, as its launcher says.

    The others may have to wait long for the first one, which draws class images: hours, not accelerate's ten minutes.

    Raises:
        TrainingConfigError: it takes each of several processes for the only one, or is set up as is not possible.
    """
    deepspeed_as_fsdp()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(hours=12))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and state.num_processes == 1:
        raise TrainingConfigError(
            f"{started} processes were started, but accelerate finds no accelerator to use together, so each would "
            "train and write by itself. To train on CPUs, set ACCELERATE_USE_CPU=true in the environment."
        )
    return state


@contextmanager
def accelerator_for(mixed_precision: str) -> Iterator[Accelerator]:
    """An `Accelerator` for one run.

    Raises:
        TrainingConfigError: the device cannot compute in this precision, the process already has an
            accelerator of another precision, or accelerate is set up for what this trainer cannot do.
    """
    ours = not is_initialized()
    this_process()
    try:
        # With the plugin, the environment's number of steps does not count: the trainer accumulates by itself.
        once = GradientAccumulationPlugin(num_steps=1)
        accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_plugin=once)
    except ValueError as error:
        _forget(ours)
        raise TrainingConfigError(
            f"accelerate cannot be set up with mixed_precision {mixed_precision!r} and the settings of its launcher or "
            f"environment: {error}"
        ) from error
    try:
        if mixed_precision == "fp16" and accelerator.scaler is None:
            raise TrainingConfigError(
                f"mixed_precision='fp16' needs a GPU, and this is {accelerator.device}; use 'bf16' or 'no'."
            )
        if accelerator.distributed_type not in _POSSIBLE:
            raise TrainingConfigError(
                f"accelerate is set up for {accelerator.distributed_type.value}, which is not possible here; choose "
                "multi-GPU or FSDP in `accelerate config`, or start without it."
            )
        yield accelerator
    finally:
        _forget(ours)


def sharding_of(state: AcceleratorState) -> FullyShardedDataParallelPlugin | None:
    """How accelerate's settings split a model over processes; None where each has the whole.

    Both versions of FSDP are done by `fully_shard`: they differ in how models are wrapped, not in what is computed.

    Raises:
        TrainingConfigError: they ask for what is not possible here.
    """
    plugin: FullyShardedDataParallelPlugin | None = None
    if state.distributed_type == DistributedType.FSDP:
        plugin = state.fsdp_plugin
    elif state.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # accelerate passes this setting over on CPUs, where PyTorch can do it all the same.
        plugin = FullyShardedDataParallelPlugin()
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
    if plugin is None:
        return None
    strategy = plugin.sharding_strategy or plugin.reshard_after_forward
    if strategy == ShardingStrategy.NO_SHARD:
        return None
    if strategy not in (True, False, ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
        raise TrainingConfigError(
            f"FSDP's {strategy.name} is not possible here; set fsdp_version: 2 and fsdp_reshard_after_forward: true in "
            "accelerate's configuration."
        )
    if plugin.activation_checkpointing:
        raise TrainingConfigError(
            "FSDP's activation checkpointing is this trainer's gradient_checkpointing: set that, and "
            "fsdp_activation_checkpointing: false in accelerate's configuration."
        )
    return plugin


def _forget(ours: bool) -> None:
    if ours:
        forget_accelerator_state()


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
