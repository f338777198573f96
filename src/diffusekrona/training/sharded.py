"""A denoiser whose frozen weights are split over the processes (FSDP), and whole again after the training.

What is trained stays whole in each process: it is small, and the loop averages its gradients itself.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from ..errors import TrainingConfigError, TrainingDivergedError, TrainingInterrupted

_log = logging.getLogger(__name__)

_IN_ALL = (TrainingInterrupted, TrainingDivergedError)
"""What every process raises at the same step, so that all can go on to put the weights together."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""What nobody calls, so that there is no moment to gather it."""


@contextmanager
def sharded(
    pipe: Any, denoiser: nn.Module, trained: Iterable[nn.Parameter], plugin: FullyShardedDataParallelPlugin
) -> Iterator[None]:
    """Let a pipeline work with its denoiser's frozen weights split over the processes.

    In its place stands a copy, which has the same trained parameters, while the denoiser itself holds no frozen
    weights. They are put together again, in all processes, unless one stops with an error that is its own.

    Args:
        pipe: the pipeline.
        denoiser: of the pipeline, equal in all processes.
        trained: its parameters that are trained, on accelerate's device; they stay whole.
        plugin: accelerate's settings.

    Raises:
        TrainingConfigError: the weights are quantized, offloaded or of some other kind that cannot be split.
    """
    excluded = set(trained)
    frozen = {name: weight for name, weight in denoiser.named_parameters() if weight not in excluded}
    _check_splittable(frozen)
    name = next(name for name, part in pipe.components.items() if part is denoiser)
    stand_in = _copy_of_the_same_weights(denoiser)
    _split(stand_in, excluded, plugin)
    setattr(pipe, name, stand_in)
    whole = False
    try:
        try:
            yield
        except _IN_ALL:
            whole = True
            raise
        whole = True
    finally:
        if whole:
            _put_together(stand_in, frozen)
        else:
            _log.error("The denoiser has no weights now, for other processes hold parts of them: load it anew.")
        setattr(pipe, name, denoiser)


def _check_splittable(weights: dict[str, nn.Parameter]) -> None:
    for name, weight in weights.items():
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
            kind = "offloaded" if weight.is_meta else f"a {type(weight).__name__} of {weight.dtype}"
            raise TrainingConfigError(
                f"FSDP cannot split the weight {name}, which is {kind}: load the base unquantized and without "
                "offloading, or train without FSDP, so that each process has all of it."
            )


def _copy_of_the_same_weights(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _split(model: nn.Module, excluded: set[nn.Parameter], plugin: FullyShardedDataParallelPlugin) -> None:
    device = next(iter(excluded)).device.type  # accelerate's, where PyTorch would take any accelerator it finds
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (torch.distributed.get_world_size(),)),
        "mp_policy": _precision(plugin),
        "offload_policy": _offloading(plugin),
        "ignored_params": excluded,
    }
    reshard = (plugin.sharding_strategy or plugin.reshard_after_forward) in (True, ShardingStrategy.FULL_SHARD)
    is_unit = _unit_policy(model, plugin)
    for part in reversed(list(model.modules())):  # what is within a part comes after it
        if part is model or (is_unit(part) and not isinstance(part, _CONTAINERS)):
            before = [
                weight for weight in part.parameters() if weight not in excluded and not isinstance(weight, DTensor)
            ]
            # The whole model's own few weights are needed at once again by the backward pass: PyTorch's default,
            # which has no name before 2.8.
            fully_shard(part, **options if part is model else {**options, "reshard_after_forward": reshard})
            for weight in before:  # which the denoiser still has
                weight.data = weight.data.new_empty(0)


def _precision(plugin: FullyShardedDataParallelPlugin) -> MixedPrecisionPolicy:
    # Inputs are not cast: bfloat16 has no room for the timesteps from 0 to 1000. Autocast takes care of the rest.
    wanted = plugin.mixed_precision_policy
    return MixedPrecisionPolicy(param_dtype=getattr(wanted, "param_dtype", None), cast_forward_inputs=False)


def _offloading(plugin: FullyShardedDataParallelPlugin) -> OffloadPolicy:
    wanted = plugin.cpu_offload
    if isinstance(wanted, CPUOffload):
        wanted = wanted.offload_params
    if wanted is True or isinstance(wanted, CPUOffloadPolicy):
        return CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
    return OffloadPolicy()


def _unit_policy(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> Callable[[nn.Module], bool]:
    """Which parts of a model are gathered by themselves, by accelerate's settings."""
    policy = plugin.auto_wrap_policy
    policy = policy.func if isinstance(policy, functools.partial) else policy
    if policy is transformer_auto_wrap_policy:
        names = set(plugin.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None) or ())
        return lambda part: type(part).__name__ in names
    if policy is size_based_auto_wrap_policy:
        return lambda part: sum(weight.numel() for weight in part.parameters()) > (plugin.min_num_params or 0)
    return lambda part: False


def _put_together(model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    shards = dict(model.named_parameters())
    for name, weight in weights.items():
        shard: Any = shards[name]
        weight.data = shard.detach().to(shard.device_mesh.device_type).full_tensor()
