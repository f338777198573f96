"""An adapter's layers as a program names and fuses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..errors import AdapterFileError
from ..kron.rows import joined
from ..kron.shapes import packed, stacked
from ..tuner.names import unwrapped_name
from ..tuner.targets import layer_shapes, target_layers
from .formats.krona import SavedAdapter
from .formats.updates import KroneckerUpdate
from .kronecker import krona_update
from .layouts.families import layout_of
from .layouts.layout import Part, outputs, redirected, redirections
from .layouts.programs import Naming, layer_name, original_layers
from .parts import Piece, assembled, cut


@dataclass(frozen=True)
class NamedLayer:
    """A layer of a file to be written.

    Attributes:
        update: Σ A ⊗ B, a convolution's with the kernel in B's columns.
        kernel: of a convolution; () for a linear layer.
    """

    update: KroneckerUpdate
    kernel: tuple[int, ...] = ()


def named_layers(saved: SavedAdapter, model: nn.Module, rule: Naming) -> dict[str, NamedLayer]:
    """The layers of a model's adapter, by the names that they have in a file.

    Args:
        saved: the adapter.
        model: what it is for.
        rule: how the program names its layers, and whether the file is a LoRA, which can hold sums of products.

    Raises:
        AdapterFileError: the program has no name for a layer, or fuses layers whose adapters are no one product.
    """
    own = {
        unwrapped_name(name): NamedLayer(krona_update(name, saved), layer_shapes(saved.config, name, layer).kernel)
        for name, layer in target_layers(model, saved.config).items()
    }
    return dict(_in_original(own, model, rule) if rule.original else _in_diffusers(own, model, rule))


def _in_diffusers(own: Mapping[str, NamedLayer], model: nn.Module, rule: Naming) -> Iterator[tuple[str, NamedLayer]]:
    """Each layer by its own name; of fused projections, which no program knows by that name, each by itself."""
    modules = {unwrapped_name(name): module for name, module in model.named_modules()}
    singles: dict[str, list[tuple[str, int]]] = {}
    for single, (whole, first) in redirections(modules).items():
        singles.setdefault(whole, []).append((single, first))
    for name, layer in own.items():
        if name not in singles:
            yield layer_name(rule, name, None), layer
        for single, first in singles.get(name, []):
            rows = (first, first + outputs(modules[single]))
            yield layer_name(rule, single, None), NamedLayer(_rows(layer.update, rows), layer.kernel)


def _in_original(own: Mapping[str, NamedLayer], model: nn.Module, rule: Naming) -> Iterator[tuple[str, NamedLayer]]:
    left = dict(own)
    layout = layout_of(model)
    if layout is None:
        originals = original_layers(model, own)
        for name, layer in own.items():
            yield layer_name(rule, name, originals.get(name)), layer
        return
    modules = {unwrapped_name(name): module for name, module in model.named_modules()}
    fused = redirections(modules)
    for original, parts in layout.parts(model, also=False):
        parts = redirected(parts, fused, modules)
        there = [part.module for part in parts if part.module in left]
        if not there:
            continue
        layer = _together(parts, own, modules)
        by_itself = rule.single is not None
        # A fresh adapter is zero, and a sum of one product whatever becomes of it.
        in_one = layer.update.num_terms == 1 and bool(layer.update.B.any() or not by_itself)
        if by_itself and (len(parts) == 1 or not in_one):
            for name in dict.fromkeys(there):
                yield layer_name(rule, name, None), own[name]
        elif in_one or rule.tensors != "lokr" or len(parts) == 1:
            yield layer_name(rule, there[0], original), layer
        else:
            raise AdapterFileError(
                f"{original} is one layer there, made of {', '.join(dict.fromkeys(part.module for part in parts))}, "
                f"and the adapters of these together are a sum of {layer.update.num_terms} products, where LoKr holds "
                "one. A LoRA holds them exactly (format 'lora', --to lora), and so do merged weights."
            )
        for name in there:
            left.pop(name, None)
    for name, layer in left.items():
        yield layer_name(rule, name, name), layer


def _together(parts: tuple[Part, ...], own: Mapping[str, NamedLayer], modules: Mapping[str, nn.Module]) -> NamedLayer:
    """The adapters of some modules as one of the layer that they are in the original."""
    if len(parts) == 1 and parts[0] == Part(parts[0].module):
        return own[parts[0].module]
    total = max(part.rows[1] for part in parts if part.rows)
    pieces = [
        Piece(own[part.module].update if part.into is None else _rows(own[part.module].update, part.into), part.rows)
        for part in parts
        if part.module in own
    ]
    whole = assembled(pieces, total)
    if not isinstance(whole, KroneckerUpdate):
        raise AdapterFileError(
            f"{', '.join(dict.fromkeys(part.module for part in parts))} are one layer there, and their factors have "
            "other columns, so that they cannot be written as one: merge them into the weights instead."
        )
    return NamedLayer(_joined(whole))  # no family fuses convolutions


def _rows(update: KroneckerUpdate, rows: tuple[int, int]) -> KroneckerUpdate:
    part = cut(update, rows, update.shapes.d)
    assert isinstance(part, KroneckerUpdate)
    return _joined(part)


def _joined(update: KroneckerUpdate) -> KroneckerUpdate:
    if update.num_terms == 1:
        return update
    A, B = joined(stacked(update.A), stacked(update.B))
    return replace(update, A=packed(A), held_b=packed(B), parameters=A.numel() + B.numel())
