"""Which layers of a model a config targets, and what it says of each; and a config that says it of given layers."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from typing import TypeVar

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from torch import nn

from ..errors import FactorShapeError
from ..kron.shapes import UpdateShapes, factor_shapes, update_shapes
from .config import KronAConfig
from .layer import layer_size
from .presets import resolved

Value = TypeVar("Value", bound=Hashable)


def target_layers(model: nn.Module, config: KronAConfig) -> dict[str, nn.Module]:
    """The layers of a model that a config targets, by dotted name. Other adapters' insides do not count."""
    config = resolved(config, model)
    named = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in named.items() if isinstance(module, BaseTunerLayer))
    return {
        name: module
        for name, module in named.items()
        if name and not name.startswith(inside) and check_target_module_exists(config, name)
    }


def layer_factors(config: KronAConfig, layer_name: str) -> tuple[int, int]:
    """(a1, a2) of a layer: the first match in `factor_pattern`, else the config's own."""
    key = get_pattern_key(list(config.factor_pattern), layer_name)
    return config.factor_pattern.get(key, (config.a1, config.a2))


def layer_alpha(config: KronAConfig, layer_name: str) -> float:
    """Alpha of a layer: the first match in `alpha_pattern`, else the config's own."""
    return config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), layer_name), config.alpha)


def layer_shapes(config: KronAConfig, layer_name: str, layer: nn.Module) -> UpdateShapes:
    """What a config trains in a layer, itself or under other adapters.

    Raises:
        FactorShapeError: the layer is neither linear nor a convolution that can be adapted, its size is not divisible
            by its factors, or the layout does not suit it.
    """
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    d, h, kernel = layer_size(base)
    if kernel and config.layout != "kron":
        raise FactorShapeError(f"it is a {type(base).__name__}, and the layout {config.layout!r} is for linear layers")
    return update_shapes(
        factor_shapes(d, h, *layer_factors(config, layer_name)), config.num_terms, config.b_rank, kernel
    )


def settle_targets(config: KronAConfig, model: nn.Module, only: Collection[str] | None = None) -> None:
    """Write into a config what its words mean in a model, and check that every layer it targets fits.

    Args:
        config: changed in `target_modules`.
        model: what it is for.
        only: names of the layers that count; None for all that are targeted.

    Raises:
        FactorShapeError: some cannot take their factors; the text lists them.
    """
    config.target_modules = resolved(config, model).target_modules
    config = _maybe_include_all_linear_layers(config, model)
    targets = target_layers(model, config)
    if only is not None:
        targets = {name: layer for name, layer in targets.items() if name.removeprefix("_orig_mod.") in only}
    problems = {}
    for name, layer in targets.items():
        try:
            layer_shapes(config, name, layer)
        except FactorShapeError as error:
            problems[name] = str(error)
    if problems:
        raise FactorShapeError(
            f"{len(problems)} targeted layer(s) cannot take these factors; nothing was changed.{listed(problems)}\n"
            "Choose other factors for them with factor_pattern={'name or regular expression': (a1, a2)}, "
            "or leave them out with exclude_modules."
        )
    for pattern in config.factor_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
            message = f"factor_pattern has {pattern!r}, which matches no targeted layer."
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def listed(problems: Mapping[str, str], shown: int = 3) -> str:
    """The first few layers' problems, a line each, for the end of an error's text."""
    lines = "".join(f"\n  {name}: {problem}." for name, problem in list(problems.items())[:shown])
    return lines + (f"\n  and {len(problems) - shown} more." if len(problems) > shown else "")


def target_only(config: KronAConfig, model: nn.Module, names: Collection[str]) -> None:
    """Let a config target just the named layers of a model."""
    config.target_modules = set(names)
    if target_layers(model, config).keys() != set(names):  # a name may end as another one does
        config.target_modules = "|".join(map(re.escape, names))


def common_and_pattern(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """The commonest of the layers' values, and a `factor_pattern`, or `alpha_pattern`, that tells the others'."""
    common = Counter(values.values()).most_common(1)[0][0]
    # The first match counts, and a name matches all that end as it does; the layers that another's name would give a
    # wrong value come first. One pattern for all others of a value: there may be hundreds.
    misled = sorted((name for name in values if _is_misled(name, values)), key=len, reverse=True)
    alike: dict[Value, list[str]] = {}
    for name, value in values.items():
        if value != common and name not in misled:
            alike.setdefault(value, []).append(re.escape(name))
    pattern = {re.escape(name): values[name] for name in misled}
    return common, pattern | {"|".join(names): value for value, names in alike.items()}


def _is_misled(name: str, values: Mapping[str, object]) -> bool:
    parts = name.split(".")
    endings = (".".join(parts[start:]) for start in range(1, len(parts)))
    return any(ending in values and values[ending] != values[name] for ending in endings)
