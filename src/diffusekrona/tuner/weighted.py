"""Weighted sums of a model's adapters as one more adapter: exact in more terms, or the nearest in a few."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import AdapterNameError, ConfigError, FactorShapeError
from ..kron.nearest import Approximation, Delta, Kronecker, nearest_kronecker, total_error
from ..kron.products import dense_update, sum_of
from ..kron.shapes import stacked
from .compat import ModulesToSaveWrapper
from .components import check_possible_name
from .config import KronAConfig
from .injected import krona_layers
from .layer import KronALayer
from .names import unwrapped_name
from .targets import common_and_pattern, layer_factors, listed, target_layers, target_only

Combination = Literal["cat", "svd"]
"""In the terms of all adapters, exactly; or the nearest in a given number of terms."""

Summands = Sequence[tuple[str, float]]
"""Adapters' names, each with its weight."""


@dataclass(frozen=True)
class WeightedSum:
    """What will be Σ w · ΔW over adapters of a model; checked, and nothing changed yet.

    Attributes:
        config: of the sum.
        layers: those that some of the adapters have, by the names that they are saved under.
        summands: the adapters and their weights.
        num_terms: of the nearest adapter; None for the exact one.
    """

    config: KronAConfig
    layers: Mapping[str, KronALayer]
    summands: Summands
    num_terms: int | None

    @torch.no_grad()
    def write(self, model: nn.Module, adapter_name: str) -> float:
        """Put the sum into an adapter that was injected as the config says; the relative error that is left."""
        fits: list[Approximation] = []
        for layer in self.layers.values():
            if self.num_terms is None:
                tensors = _exact(layer, adapter_name, self.summands)
            else:
                fits.append(_nearest(layer, adapter_name, self.summands, self.num_terms))
                tensors = {"krona_A": fits[-1].A, "krona_B": fits[-1].B}
            for key, parameter in layer.parameters_of(adapter_name).items():
                parameter.data = tensors[key].view(parameter.shape)
        names = [name for name, _ in self.summands]
        for copies in _copied_modules(model, names):
            trained = next(copies[name] for name in names if name in copies)
            copies[adapter_name].load_state_dict(trained.state_dict())
        return total_error(fits)


def weighted_sum(
    model: nn.Module,
    configs: Mapping[str, object],
    adapter_name: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination: Combination,
    num_terms: int | None,
) -> WeightedSum:
    """The weighted sum of adapters, to be called `adapter_name`; `KronAModel.add_weighted_adapter` tells the rest."""
    if combination not in get_args(Combination):
        raise ConfigError(
            "combination_type must be 'cat', the exact sum in the terms of all adapters, or 'svd', the nearest in "
            f"num_terms terms, not {combination!r}."
        )
    if combination == "cat" and num_terms is not None:
        raise ConfigError("num_terms is for combination_type='svd'; 'cat' takes the terms of all adapters.")
    if num_terms is not None and num_terms < 1:
        raise ConfigError(f"num_terms must be at least 1, not {num_terms}.")
    used = _used(configs, adapter_name, adapters, weights)
    _check_copies(model, adapters)
    layers = {
        unwrapped_name(name): layer
        for name, layer in krona_layers(model).items()
        if any(adapter in layer.krona_A for adapter in adapters)
    }
    shapes = _factor_shapes(layers, adapters, alike=combination == "cat")
    if combination == "svd":
        num_terms = used[0].num_terms if num_terms is None else num_terms
    config = _config(model, shapes, used, num_terms)
    return WeightedSum(config, layers, list(zip(adapters, map(float, weights), strict=True)), num_terms)


def _used(
    configs: Mapping[str, object], adapter_name: str, adapters: Sequence[str], weights: Sequence[float]
) -> list[KronAConfig]:
    """The adapters' configs, if they have a sum."""
    check_possible_name(adapter_name)
    if adapter_name in configs:
        raise AdapterNameError(f"There is an adapter named {adapter_name!r} already; give the sum another name.")
    known = {name: config for name, config in configs.items() if isinstance(config, KronAConfig)}
    unknown = [name for name in adapters if name not in known]
    if unknown:
        raise AdapterNameError(f"No KronA adapter is named {unknown[0]!r}; there are: {', '.join(known)}.")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"A weighted sum needs adapters and as many weights, not {len(adapters)} and {len(weights)}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"The weights of a sum must be finite numbers, not {weights!r}.")
    if len({known[name].layout for name in adapters}) > 1:
        raise ConfigError("Adapters of different layouts have no sum that is one adapter.")
    return [known[name] for name in adapters]


def _check_copies(model: nn.Module, adapters: Sequence[str]) -> None:
    for copies in _copied_modules(model, adapters):
        trained = [name for name in dict.fromkeys(adapters) if name in copies]
        if len(trained) > 1:
            raise ConfigError(
                f"The adapters {' and '.join(map(repr, trained))} have a module in modules_to_save in common, and "
                "modules that are trained in full have no sum."
            )


def _copied_modules(model: nn.Module, adapters: Sequence[str]) -> list[nn.ModuleDict]:
    """For each module that one of the adapters trains in full: adapter name → its copy."""
    wrappers = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    return [one.modules_to_save for one in wrappers if any(name in one.modules_to_save for name in adapters)]


def _factor_shapes(
    layers: Mapping[str, KronALayer], adapters: Sequence[str], alike: bool
) -> dict[str, tuple[int, int]]:
    """(a1, a2) of each layer: the first adapter's of those that have it, and if `alike`, that of all of them."""
    shapes: dict[str, tuple[int, int]] = {}
    problems = {}
    for name, layer in layers.items():
        found = {one: layer.shapes(one).factors[:2] for one in dict.fromkeys(adapters) if one in layer.krona_A}
        shapes[name] = next(iter(found.values()))
        if alike and len(set(found.values())) > 1:
            problems[name] = ", ".join(f"{pair} in {one!r}" for one, pair in found.items())
    if problems:
        raise FactorShapeError(
            f"{len(problems)} layer(s) have other factors (a1, a2) in one adapter than in another, so the exact sum is "
            f"no KronA adapter (the nearest is combination_type='svd'); nothing was changed.{listed(problems)}"
        )
    return shapes


def _config(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], used: Sequence[KronAConfig], num_terms: int | None
) -> KronAConfig:
    """The config of a sum of adapters that has these layers with this (a1, a2) each."""
    config = copy.deepcopy(used[0])
    ranks = [one.b_rank for one in used if one.b_rank is not None]
    config.b_rank = max(ranks) if num_terms is None and len(ranks) == len(used) else None
    all_terms = sum(max([one.num_terms, *one.terms_pattern.values()]) for one in used)
    config.num_terms, config.terms_pattern = all_terms if num_terms is None else num_terms, {}
    config.alpha, config.alpha_pattern, config.scaling = 1.0, {}, "alpha"
    modules = dict.fromkeys(name for one in used for name in one.modules_to_save or ())
    config.modules_to_save = list(modules) or None
    if config.b1 is not None or any(layer_factors(config, name, 0) != pair for name, pair in shapes.items()):
        (config.a1, config.a2), config.factor_pattern = common_and_pattern(shapes)
        config.b1 = None
    if target_layers(model, config).keys() != shapes.keys():
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        target_only(config, model, shapes)
    return config


def _exact(layer: KronALayer, adapter_name: str, summands: Summands) -> dict[str, Tensor]:
    """The factors of Σ w · ΔW, each adapter's in its own terms; terms to spare are zeros."""
    tensors = {}
    for key, parameter in layer.parameters_of(adapter_name).items():
        factors = [(_stacked(layer, key, name), scale) for name, scale in _scales(layer, summands)]
        dtype = reduce(torch.promote_types, (factor.dtype for factor, _ in factors), parameter.dtype)
        total, start = torch.zeros_like(stacked(parameter), dtype=dtype), 0
        for factor, scale in factors:
            terms, rows, columns = factor.shape
            total[start : start + terms, :rows, :columns] = factor.to(dtype) * (scale if key == "krona_A" else 1)
            start += terms
        tensors[key] = total
    return tensors


def _scales(layer: KronALayer, summands: Summands) -> Iterator[tuple[str, float]]:
    """The adapters that a layer has, each with its weight times the scale in force."""
    return ((name, weight * layer.scaling[name]) for name, weight in summands if name in layer.krona_A)


def _stacked(layer: KronALayer, key: str, adapter_name: str) -> Tensor:
    """One adapter's factors of a kind, terms first; as B, products multiplied out."""
    if key == "krona_B":
        return torch.stack([B for _, B in layer.factors(adapter_name)])
    return stacked(layer.factors_here(adapter_name)[key])


def _nearest(layer: KronALayer, adapter_name: str, summands: Summands, num_terms: int) -> Approximation:
    a1, a2, b1, _ = layer.shapes(adapter_name).factors
    terms = [
        (A.double() * scale, B.double()) for name, scale in _scales(layer, summands) for A, B in layer.factors(name)
    ]
    delta: Delta
    if len({A.shape for A, _ in terms}) == 1:
        delta = Kronecker(*(torch.stack(factors) for factors in zip(*terms, strict=True)))
    else:
        layout = layer.layout[adapter_name]
        dense = sum_of(dense_update([term], layout) for term in terms)
        # What the layout makes of the output's order is undone, and done again to the nearest.
        delta = dense.view(b1, a1, -1).transpose(0, 1).flatten(0, 1) if layout == "transposed" else dense
    return nearest_kronecker(delta, a1, a2, num_terms)
