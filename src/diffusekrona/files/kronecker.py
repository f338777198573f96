"""Updates that are Kronecker products as KronA adapters of a model, and the layers of such an adapter as updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError
from ..kron.costs import cheapest_order, krona_multiply_adds
from ..kron.shapes import update_shapes
from ..tuner.config import KronAConfig
from ..tuner.names import FACTORS, factor_name, in_component
from ..tuner.targets import common_and_pattern, layer_scale, target_only
from .formats.krona import SavedAdapter
from .formats.library import LibraryUpdate
from .formats.updates import LARGEST_PRODUCT, LARGEST_UPDATE, KroneckerUpdate, Update, by
from .layouts.layout import Place
from .parts import Assembled
from .unused import Unused, few

FEW_TERMS = 8
"""Products that a layer's adapter may always sum; where there are more, they have to be cheaper than the weight."""


def kronecker_only(updates: Mapping[Place, Update], source: Path, unused: Unused) -> dict[Place, KroneckerUpdate]:
    """Those of some updates that an adapter of ours can be; the others are noted as unused."""
    layers: dict[Place, KroneckerUpdate] = {}
    others: dict[tuple[str, bool], list[str]] = {}
    for (part, name), update in updates.items():
        label = in_component(part, name)
        if isinstance(update, KroneckerUpdate) and update.dora_scale is None:
            if update.bias is not None:
                reason = f"{source} changes biases, which no adapter of ours does"
                others.setdefault((reason, False), []).append(label)
            if update.num_terms <= FEW_TERMS or _pays(update):
                layers[part, name] = update
                continue
            reason = (
                f"{source} has layers that are rows of one product; in this model they would be sums of up to "
                f"{update.num_terms} products, which cost more than the whole weight"
            )
            others.setdefault((reason, True), []).append(label)
            continue
        approximable = update.has_delta and not update.of_norm
        others.setdefault((_no_product(update, source), approximable), []).append(label)
    for (reason, approximable), names in others.items():
        nearest = "; `diffusekrona convert --budget` finds the nearest Kronecker products" if approximable else ""
        unused.add(
            f"{reason} ({len(names)} of {len(updates)} layers: {few(names)}). merge_file(pipe, path) merges them into "
            f"the weights exactly{nearest}."
        )
    return layers


def _pays(update: KroneckerUpdate) -> bool:
    """Whether a sum of products takes fewer multiply-adds than the weight that it is added to."""
    shapes = update.shapes
    return update.num_terms * krona_multiply_adds(shapes, cheapest_order(shapes)) <= shapes.d * shapes.h


def _no_product(update: Update, source: Path) -> str:
    if isinstance(update, Assembled):
        for piece, _ in update.pieces:
            if not isinstance(piece, KroneckerUpdate) or piece.dora_scale is not None:
                return _no_product(piece, source)
        return f"{source} has products of other shapes for parts of what is one layer in this model"
    if update.bias_only:
        return f"{source} changes biases, which no adapter of ours does"
    if isinstance(update, LibraryUpdate) and update.kind == "lora":
        return f"{source} holds LoRA updates from PiSSA or OLoRA, which count from other weights than the base's"
    if isinstance(update, LibraryUpdate):
        return f"{source} holds {update.kind} updates, which multiply the base's weights"
    if update.dora_scale is not None:
        return f"{source} holds DoRA updates, which depend on the base's weights"
    if update.of_norm:
        return f"{source} changes norms, which no adapter of ours does"
    kind = {"lora": "LoRA", "loha": "LoHa"}.get(update.kind, "whole")
    return f"{source} holds {kind} updates, which are no Kronecker products, so they cannot become an adapter exactly"


def as_krona(
    layers: Mapping[Place, KroneckerUpdate], components: Mapping[str, nn.Module], source: Path
) -> dict[str, SavedAdapter]:
    """The same updates as a KronA adapter of each component.

    Raises:
        AdapterFileError: layouts differ.
    """
    if len({layer.layout for layer in layers.values()}) > 1:
        raise AdapterFileError(f"{source} mixes LoKr with layers of the paper authors' layout, which is not supported.")
    return {
        part: _adapter({name: one for (of, name), one in layers.items() if of == part}, components[part], source)
        for part in dict.fromkeys(part for part, _ in layers)
    }


def _adapter(layers: Mapping[str, KroneckerUpdate], component: nn.Module, source: Path) -> SavedAdapter:
    b_rank = _common_b_rank(layers)
    (a1, a2), factor_pattern = common_and_pattern({name: layer.shapes[:2] for name, layer in layers.items()})
    alpha, alpha_pattern = common_and_pattern({name: layer.scale for name, layer in layers.items()})
    num_terms, terms_pattern = common_and_pattern({name: layer.num_terms for name, layer in layers.items()})
    config = KronAConfig(
        a1=a1,
        a2=a2,
        alpha=alpha,
        num_terms=num_terms,
        b_rank=b_rank,
        layout=next(iter(layers.values())).layout,
        factor_pattern=factor_pattern,
        alpha_pattern=alpha_pattern,
        terms_pattern=terms_pattern,
    )
    target_only(config, component, layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[factor_name(name, "A")] = layer.A.contiguous()
        if b_rank is not None and layer.b_parts is not None:
            for key, part in zip(("B1", "B2"), layer.b_parts, strict=True):
                tensors[factor_name(name, key)] = part.contiguous()
        else:
            tensors[factor_name(name, "B")] = layer.B.contiguous()
    return SavedAdapter(config, tensors, source)


def _common_b_rank(layers: Mapping[str, KroneckerUpdate]) -> int | None:
    """The rank with which `KronAConfig` would make products of just those B that are products; None if there is none.

    Without one, products are multiplied out, which is the same function.
    """
    ranks = {layer.b_parts[0].shape[1] for layer in layers.values() if layer.b_parts is not None}
    if len(ranks) != 1:
        return None
    rank = ranks.pop()
    agree = all(
        (update_shapes(layer.shapes, b_rank=rank).b_rank is not None) == (layer.b_parts is not None)
        for layer in layers.values()
    )
    return rank if agree else None


def krona_update(name: str, saved: SavedAdapter) -> KroneckerUpdate:
    """The update of a layer in an adapter of ours.

    Raises:
        AdapterFileError: a factor is missing or not finite, or the factors do not fit each other or are too large.
    """
    factors = {
        key: saved.tensors[factor_name(name, key)].float() for key in FACTORS if factor_name(name, key) in saved.tensors
    }
    if factors.keys() not in ({"A", "B"}, {"A", "B1", "B2"}):
        raise AdapterFileError(f"{saved.source} has not all factors of the layer {name}.")
    _check_factors(factors, f"{saved.source}: the layer {name}")
    b_parts = None if "B" in factors else (factors["B1"], factors["B2"])
    return KroneckerUpdate(
        factors["A"],
        factors["B"] if b_parts is None else b_parts if b_parts[0].dim() == 2 else torch.matmul(*b_parts),
        layer_scale(saved.config, name),
        layout=saved.config.layout,
        kind="krona",
        where=f"{saved.source}: the layer {name}",
        parameters=sum(factor.numel() for factor in factors.values()),
    )


def _check_factors(factors: Mapping[str, Tensor], where: str) -> None:
    """Raise `AdapterFileError` unless A and B, or A and B1·B2, make an update, whatever model it may be for."""
    left, *right = factors.values()
    shapes = [factor.shape for factor in factors.values()]
    alike = left.dim() in (2, 3) and all(factor.dim() == left.dim() for factor in right) and all(map(math.prod, shapes))
    if (
        not alike
        or any(shape[:-2] != left.shape[:-2] for shape in shapes)
        or (len(right) == 2 and shapes[1][-1] != shapes[2][-2])
    ):
        found = ", ".join(f"{key} of {by(factor.shape)}" for key, factor in factors.items())
        raise AdapterFileError(f"{where} has {found}, which do not fit each other; the file is damaged.")
    if not all(bool(factor.isfinite().all()) for factor in factors.values()):
        raise AdapterFileError(f"{where} holds an infinity or a NaN: its training failed, or the file is damaged.")
    size = (left.shape[-2] * shapes[1][-2], left.shape[-1] * shapes[-1][-1])
    product = math.prod((*shapes[1][:-1], shapes[-1][-1])) if len(right) == 2 else 0
    if product > LARGEST_PRODUCT or math.prod(size) > LARGEST_UPDATE:
        raise AdapterFileError(
            f"{where} is an update of {by(size)}, or has a B, larger than any weight: the file is damaged, or made "
            "to do harm."
        )
