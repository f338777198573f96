"""Optimizers by name: those of torch, bitsandbytes, prodigyopt and pytorch-optimizer, and the arguments of each."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from ..errors import TrainingConfigError
from .config import TrainingConfig

_OF_BITSANDBYTES = re.compile(r"paged.*|.*(8|32)bit")
_TAKES_ADAM_SETTINGS = re.compile(r"(paged)?adamw(8bit|32bit)?|prodigy")
_OTHERS_IN_LOWER_CASE = ("adadelta", "adafactor", "adamax", "asgd", "muon", "radam")
"""Names of torch's whose lower case means pytorch-optimizer's, which can do more."""

_OURS = {"params", "lr", "self", "kwargs", "args", "fused"}
"""Arguments that are no choice of the user, or a setting of another name."""

_STATED = {"adafactor": {"relative_step": False, "scale_parameter": False}}
"""Arguments without which an optimizer would leave the learning rate alone."""

_REASONS_AGAINST = {
    "adahessian": "needs second derivatives",
    "adalomo": "takes its step within the backward pass",
    "adammini": "needs the whole model",
    "bsam": "takes two passes in each step",
    "conda": "keeps what cannot be saved without pickling",
    "demo": "sends its own messages between processes",
    "distributedmuon": "sends its own messages between processes",
    "lomo": "takes its step within the backward pass",
    "lorarite": "is for pairs of LoRA's matrices",
    "muonclip": "needs the attention's logits",
    "scalableshampoo": "keeps what cannot be saved without pickling",
    "sophiah": "needs second derivatives",
    "sparseadam": "needs sparse gradients",
    "stablespam": "does not tell all of its state, so that no run could be resumed",
}


class OptimizerKind:
    """An optimizer that a name stands for.

    Args:
        name: as the settings have it; AdamW and adamw are the same.

    Attributes:
        build: its class.
        takes_adam_settings: whether the settings that begin with `adam_` are for it.
        has_muon_groups: whether its groups have to tell matrices from other parameters.

    Raises:
        TrainingConfigError: there is none of this name, its package is missing, or it cannot be used here.
    """

    def __init__(self, name: str) -> None:
        self.name, self._plain = name, _plain(name)
        self.build = _found(name)
        self.takes_adam_settings = _TAKES_ADAM_SETTINGS.fullmatch(self._plain) is not None
        self.has_muon_groups = any(kind.__name__ == "MuonBase" for kind in self.build.__mro__)
        if (reason := self._reason_against()) is not None:
            raise TrainingConfigError(f"optimizer {name!r} cannot be used here, for it {reason}: choose another one.")

    def arguments(self, config: TrainingConfig) -> dict[str, Any]:
        """What it is made with, but for the parameters and their learning rates.

        Raises:
            TrainingConfigError: an argument is unknown or is another setting, or a setting is not for this optimizer.
        """
        known = {name: p for name, p in inspect.signature(self.build).parameters.items() if name not in _OURS}
        given = config.optimizer_args
        for name in given:
            if name == "lr":
                raise TrainingConfigError("optimizer_args has lr, which is the setting learning_rate.")
            if name not in known:
                raise TrainingConfigError(
                    f"optimizer {self.name!r} has no argument {name!r} for optimizer_args; it has {', '.join(known)}."
                )
        adam = self._adam_arguments(config, given)
        stated = {name: value for name, value in _STATED.get(self._plain, {}).items() if name in known}
        return {**adam, **stated, **{name: _as(value, known[name].default) for name, value in given.items()}}

    def _adam_arguments(self, config: TrainingConfig, given: Mapping[str, Any]) -> dict[str, Any]:
        settings = {
            "betas": ("adam_beta1", "adam_beta2"),
            "weight_decay": ("adam_weight_decay",),
            "eps": ("adam_epsilon",),
        }
        for argument, names in settings.items():
            for name in names:
                changed = getattr(config, name) != TrainingConfig.model_fields[name].default
                if changed and not self.takes_adam_settings:
                    raise TrainingConfigError(
                        f"{name} is given, but is not for optimizer {self.name!r}, whose own arguments optimizer_args "
                        "gives."
                    )
                if changed and argument in given:
                    raise TrainingConfigError(f"optimizer_args has {argument}, and {name} is given: leave one out.")
        if not self.takes_adam_settings:
            return {}
        values: dict[str, Any] = {name: getattr(config, names[0]) for name, names in settings.items()}
        return {**values, "betas": (config.adam_beta1, config.adam_beta2)}

    def _reason_against(self) -> str | None:
        if self._plain in _REASONS_AGAINST:
            return _REASONS_AGAINST[self._plain]
        step = inspect.signature(self.build.step).parameters
        if "closure" in step and step["closure"].default is inspect.Parameter.empty:
            return "computes the loss several times in a step"
        if hasattr(self.build, "train") and hasattr(self.build, "eval"):
            return "keeps two sets of parameters, between which a program has to switch"
        return None if "lr" in inspect.signature(self.build).parameters else "has no learning rate of its own"


def check_optimizer(config: TrainingConfig) -> None:
    """Raise `TrainingConfigError` where a config's optimizer, or an argument of it, cannot be."""
    OptimizerKind(config.optimizer).arguments(config)


def _plain(name: str) -> str:
    return re.sub(r"[_-]", "", name.lower())


def _as(value: Any, default: Any) -> Any:
    """A value of a settings file as an optimizer takes it."""
    if isinstance(default, torch.dtype) and isinstance(value, str):
        return getattr(torch, value, value)
    return tuple(value) if isinstance(value, list) else value


def _found(name: str) -> type[torch.optim.Optimizer]:
    plain = _plain(name)
    torchs = _of_torch()
    if name in torchs or (plain not in _OTHERS_IN_LOWER_CASE and plain in map(_plain, torchs)):
        return next(kind for one, kind in torchs.items() if one == name or _plain(one) == plain)
    if plain == "prodigy":
        prodigy: type[torch.optim.Optimizer] = _package(name, "prodigyopt").Prodigy
        return prodigy
    if _OF_BITSANDBYTES.fullmatch(plain):
        known = _of_bitsandbytes(name)
        if plain in known:
            return known[plain]
        raise _unknown(name, [_with_underscore(one) for one in known])
    others = _package(name, "pytorch-optimizer", f"no optimizer of torch is called {name!r}, and others need")
    names = others.get_supported_optimizers()
    if plain in names:
        found: type[torch.optim.Optimizer] = others.load_optimizer(plain)
        return found
    raise _unknown(name, [*torchs, *names, "prodigy", "adamw8bit", "paged_adamw8bit", "lion8bit", "ademamix8bit"])


def _of_torch() -> dict[str, type[torch.optim.Optimizer]]:
    found = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    base = torch.optim.Optimizer
    return {name: kind for name, kind in found.items() if issubclass(kind, base) and kind is not base}


def _of_bitsandbytes(name: str) -> dict[str, type[torch.optim.Optimizer]]:
    _package(name, "bitsandbytes")
    found = {_plain(one): kind for one, kind in vars(import_module("bitsandbytes.optim")).items()}
    return {one: kind for one, kind in found.items() if isinstance(kind, type) and _OF_BITSANDBYTES.fullmatch(one)}


def _with_underscore(plain: str) -> str:
    return re.sub("^paged", "paged_", plain)


def _package(name: str, package: str, why: str | None = None) -> Any:
    try:
        return import_module(package.replace("-", "_"))
    except ImportError as error:
        needs = why or f"optimizer {name!r} needs"
        raise TrainingConfigError(f"{needs} {package}: pip install {package}.") from error


def _unknown(name: str, known: list[str]) -> TrainingConfigError:
    near = difflib.get_close_matches(name, known, 1, 0.5) or difflib.get_close_matches(name.lower(), known, 1, 0)
    return TrainingConfigError(
        f"There is no optimizer {name!r}; did you mean {near[0]!r}? It may be one of torch.optim, such as AdamW, of "
        "bitsandbytes, such as adamw8bit, of pytorch-optimizer, such as came, or prodigy."
    )
