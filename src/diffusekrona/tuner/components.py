"""Which modules of a pipeline an adapter goes into, and which of their parameters were trainable before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import AdapterNameError, KronAError
from .compat import ADAPTED, COMPILED
from .config import KronAConfig
from .names import DENOISERS, TEXT_ENCODERS


@dataclass
class _Before:
    """What a module was before our first adapter."""

    trainable: list[nn.Parameter]
    adapted: bool
    """Whether it held other methods' adapters."""


_BEFORE = "_before_krona"
"""The attribute of a module that keeps this, so that a copy of the module has its own."""


def is_pipeline(model: Any) -> bool:
    """Whether `model` is a Diffusers pipeline rather than a single module."""
    return not isinstance(model, nn.Module) and isinstance(getattr(model, "components", None), dict)


def adaptable_components(model: Any) -> dict[str, nn.Module]:
    """The denoiser and text encoders of a pipeline by component name, denoiser first; a single module as "".

    Raises:
        KronAError: neither a module nor a pipeline with a UNet or transformer.
    """
    if isinstance(model, nn.Module):
        return {"": unwrapped(model)}
    parts = model.components if is_pipeline(model) else {}
    found = {
        name: unwrapped(parts[name]) for name in (*DENOISERS, *TEXT_ENCODERS) if isinstance(parts.get(name), nn.Module)
    }
    if not any(name in DENOISERS for name in found):
        raise KronAError(
            "Expected a torch module or a Diffusers pipeline with a `unet` or `transformer`, "
            f"got {type(model).__name__}."
        )
    return found


def all_modules(model: Any) -> list[nn.Module]:
    """Every module of a pipeline, adaptable or not; a single module by itself."""
    if isinstance(model, nn.Module):
        return [unwrapped(model)]
    return [unwrapped(part) for part in model.components.values() if isinstance(part, nn.Module)]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that adapters go into, without the wrappers of torch.compile, of distributed training and of PEFT."""
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module.get_base_model() if isinstance(module, PeftModel) else module


def _wrapped(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return module.module  # type: ignore[no-any-return]
    inner = getattr(module, COMPILED, None)
    return inner if isinstance(inner, nn.Module) else None


def adapter_names(component: nn.Module) -> list[str]:
    """Names of the KronA adapters in a component, oldest first."""
    configs: dict[str, Any] = getattr(component, "peft_config", None) or {}
    return [name for name, config in configs.items() if isinstance(config, KronAConfig)]


def check_possible_name(adapter_name: str) -> None:
    """Raise `AdapterNameError` if no module could have such a key."""
    if not adapter_name or "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name):
        raise AdapterNameError(
            f"An adapter cannot be named {adapter_name!r}: a name must not be empty, hold a dot, or be what "
            "torch's modules call something of their own."
        )


def check_free_name(components: Iterable[nn.Module], adapter_name: str) -> None:
    """Raise `AdapterNameError` if no module could have such a key, or any method's adapter has the name."""
    check_possible_name(adapter_name)
    for component in components:
        if adapter_name in (getattr(component, "peft_config", None) or {}):
            raise AdapterNameError(
                f"The {type(component).__name__} already has an adapter named {adapter_name!r}; "
                "give this one another adapter_name, or take that one out first."
            )


def named_adapter(components: dict[str, nn.Module], adapter_name: str | None) -> str:
    """The adapter meant by `adapter_name`; None means the only one there is.

    Raises:
        AdapterNameError: there is none of that name, or None is asked for and there is not exactly one.
    """
    names = list(dict.fromkeys(name for component in components.values() for name in adapter_names(component)))
    if adapter_name is None and len(names) == 1:
        return names[0]
    if adapter_name in names:
        return str(adapter_name)
    if not names:
        raise AdapterNameError("There is no KronA adapter here; add one with inject_krona or load_krona.")
    problem = (
        "Say by adapter_name which adapter is meant"
        if adapter_name is None
        else f"No KronA adapter is named {adapter_name!r}"
    )
    raise AdapterNameError(f"{problem}; there are: {', '.join(names)}.")


def remember(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Note what modules are before our first adapter, for `restore`. Returns those not noted already."""
    new = [module for module in modules if _BEFORE not in vars(module)]
    for module in new:
        trainable = [p for p in module.parameters() if p.requires_grad]
        vars(module)[_BEFORE] = _Before(trainable, bool(getattr(module, "peft_config", None)))
    return new


def restore(modules: Iterable[nn.Module]) -> None:
    """Make the parameters trainable again that were so before the first KronA adapter; the last one is gone.

    A module that got another method's adapter meanwhile stays frozen: that adapter would have frozen it.
    """
    for module in modules:
        before: _Before | None = vars(module).pop(_BEFORE, None)
        if before is None or (getattr(module, "peft_config", None) and not before.adapted):
            continue
        for parameter in before.trainable:
            parameter.requires_grad_(True)


def forget(modules: Iterable[nn.Module]) -> None:
    """Drop what `remember` noted."""
    for module in modules:
        vars(module).pop(_BEFORE, None)


def mark_adapted(component: nn.Module) -> None:
    """Tell Diffusers and transformers that the component has adapters, as their own `add_adapter` does."""
    if hasattr(component, ADAPTED):
        setattr(component, ADAPTED, True)
