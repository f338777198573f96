"""Optimizers by name, and their state as tensors and plain values, which files hold without pickling."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TrainingConfigError
from .config import ENCODER_RATES, TrainingConfig
from .optimizer_names import OptimizerKind


def optimizer_of(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that a config names, with groups for text encoders and for B that have a rate of their own.

    Args:
        parameters: by name; a text encoder's starts with `text_encoder`, and B's ends in `krona_B` or `lora_B`.
        config: optimizer and its arguments, learning rates.

    Raises:
        TrainingConfigError: it needs a package that is not installed, does not take an argument, or a learning rate is
            of nothing.
    """
    kind = OptimizerKind(config.optimizer)
    arguments = {"lr": config.learning_rate, **kind.arguments(config)}
    groups = _groups(parameters, config)
    if kind.build.__name__ == "Prodigy" and len({group["lr"] for group in groups}) > 1:
        raise TrainingConfigError(
            "optimizer 'prodigy' finds one learning rate for all: leave those of text encoders and of B out."
        )
    if kind.build is torch.optim.AdamW and not {"foreach", "capturable"} & arguments.keys():
        # An adapter is hundreds of small tensors, and one fused call is quicker than a dozen for each of them.
        arguments["fused"] = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    if kind.has_muon_groups:
        groups = [part for group in groups for part in _matrices_and_others(group)]
    try:
        return kind.build(groups, **arguments)
    except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise TrainingConfigError(
            f"optimizer {config.optimizer!r} cannot be made with optimizer_args {config.optimizer_args}: {error}"
        ) from error


def _matrices_and_others(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A group in two for Muon, which is for matrices, and takes Adam's step on the others."""
    for muon in (True, False):
        if params := [parameter for parameter in group["params"] if (parameter.dim() == 2) is muon]:
            yield {**group, "params": params, "use_muon": muon}


def _groups(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> list[dict[str, Any]]:
    """The parameters by their learning rates: the denoiser's, each text encoder's, and B's among them."""
    parts = {_part(name) for name in parameters}
    chosen = config.text_encoders_to_train
    if chosen is not None and (others := parts - {"", *chosen}):
        raise TrainingConfigError(
            f"Parameters of {', '.join(sorted(others))} are given, but text_encoders_to_train names only "
            f"{', '.join(chosen)}."
        )
    common = config.text_encoder_lr or config.learning_rate
    rates = {"": config.learning_rate, "text_encoder": common}
    for name in ENCODER_RATES[1:]:
        part, rate = name.removesuffix("_lr"), getattr(config, name)
        if rate is not None and part not in parts:
            raise TrainingConfigError(f"{name} is given, but the pipeline has no {part} that is trained.")
        rates[part] = rate or common
    ratio = config.loraplus_lr_ratio
    if ratio != 1 and not any(_is_b(name) for name in parameters):
        raise TrainingConfigError("loraplus_lr_ratio is given, but nothing that is trained is a B of KronA or LoRA.")
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {(part, b): [] for part in rates for b in (False, True)}
    for name, parameter in parameters.items():
        groups[_part(name), ratio != 1 and _is_b(name)].append(parameter)
    return [{"params": group, "lr": rates[part] * (ratio if b else 1)} for (part, b), group in groups.items() if group]


def _part(name: str) -> str:
    """The text encoder that a parameter belongs to, or "" for the denoiser."""
    part = name.partition(".")[0]
    return part if part.startswith("text_encoder") else ""


def _is_b(name: str) -> bool:
    return bool(re.search(r"\.(krona|lora)_B[12]?(\.|$)", name))


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors, and what else there is of it as values for JSON.

    Raises:
        CheckpointError: it holds something that is neither.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, {"state": _told(optimizer.state_dict(), (), tensors)}


def _told(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """A value for JSON that `_meant` makes the same again; its tensors are put into `tensors` by their paths."""
    if isinstance(value, Tensor):
        # bitsandbytes shares its tables between parameters, and a file's tensors share nothing. Of a matrix that lies
        # in memory by its columns, as linear algebra leaves it, later products are rounded otherwise than by rows.
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda axis: -strides[axis])
        tensors["/".join(path)] = value.detach().permute(order).clone(memory_format=torch.contiguous_format)
        return {"tensor": ["/".join(path), order]}
    if isinstance(value, Mapping):  # whose keys may be numbers, which JSON's are not
        return {"map": [[key, _told(one, (*path, str(key)), tensors)] for key, one in value.items()]}
    if isinstance(value, deque):
        return {"deque": [value.maxlen, _told(list(value), path, tensors)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_told(one, (*path, str(i)), tensors) for i, one in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"The optimizer's {'/'.join(path)} is a {type(value).__name__}, which a checkpoint cannot hold: train with "
        "another optimizer."
    )


def _meant(told: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(told, dict):
        return told
    ((kind, value),) = told.items()
    if kind == "tensor":
        name, order = value
        return tensors[name].permute([order.index(axis) for axis in range(len(order))])
    if kind == "map":
        return {key: _meant(one, tensors) for key, one in value}
    if kind == "deque":
        return deque(_meant(value[1], tensors), maxlen=value[0])
    if kind == "dtype":
        return getattr(torch, value)
    items = [_meant(one, tensors) for one in value]
    return items if kind == "list" else tuple(items)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Give an optimizer of the same parameters the state that `optimizer_state` took."""
    state = _meant(values["state"], tensors)
    for group in state["param_groups"]:  # whose tensors PyTorch leaves where they are
        device = optimizer.param_groups[0]["params"][0].device
        group |= {name: value.to(device) for name, value in group.items() if isinstance(value, Tensor)}
    optimizer.load_state_dict(state)
