"""Optimizers by name, and their state as tensors and plain values, which files hold without pickling."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingConfigError
from .config import ENCODER_RATES, TrainingConfig


def optimizer_of(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that a config names, with groups for text encoders and for B that have a rate of their own.

    Args:
        parameters: by name; a text encoder's starts with `text_encoder`, and B's ends in `krona_B` or `lora_B`.
        config: optimizer, learning rates, betas, decay.

    Raises:
        TrainingConfigError: it needs a package that is not installed, or a learning rate is of nothing.
    """
    groups = _groups(parameters, config)
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw8bit":
        return _adamw8bit(groups, options)
    if config.optimizer == "prodigy":
        return _prodigy(groups, options)
    # An adapter is hundreds of small tensors, and one fused call is quicker than a dozen for each of them.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    return torch.optim.AdamW(groups, fused=fused, **options)


def _groups(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> list[dict[str, Any]]:
    """The parameters by their learning rates: the denoiser's, each text encoder's, and B's among them."""
    parts = {_part(name) for name in parameters}
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


def _adamw8bit(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise TrainingConfigError("optimizer 'adamw8bit' needs bitsandbytes: pip install bitsandbytes.") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
    return optimizer


def _prodigy(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise TrainingConfigError("optimizer 'prodigy' needs prodigyopt: pip install prodigyopt.") from error
    if len({group["lr"] for group in groups}) > 1:
        raise TrainingConfigError(
            "optimizer 'prodigy' finds one learning rate for all: leave those of text encoders and of B out."
        )
    optimizer: torch.optim.Optimizer = Prodigy(groups, **options)
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors, and what else there is of it as values for JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"groups": state["param_groups"], "state": {}}
    for path, value in _leaves(state["state"]):
        if isinstance(value, Tensor):
            # bitsandbytes shares its tables between parameters, and a file's tensors share nothing.
            tensors["/".join(path)] = value.clone()
        else:
            values["state"]["/".join(path)] = value
    return tensors, values


def _leaves(tree: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of dictionaries in dictionaries; bitsandbytes keeps its tensors two deep."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Give an optimizer of the same parameters the state that `optimizer_state` took."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**values["state"], **tensors}.items():
        number, *parents, key = name.split("/")
        entries = state.setdefault(int(number), {})
        for parent in parents:
            entries = entries.setdefault(parent, {})
        entries[key] = value
    groups = [{key: tuple(v) if key == "betas" else v for key, v in group.items()} for group in values["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
