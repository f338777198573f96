"""merge_file: any adapter file into a pipeline's weights, exactly and for good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError, MergeError
from ..kron.exact import MERGEABLE_DTYPES, arithmetic_dtype
from ..storage import resolve
from ..tuner.compat import BaseTunerLayer
from ..tuner.components import adaptable_components
from ..tuner.injected import krona_layers
from ..tuner.merged import check_in_memory
from .formats.updates import Update
from .layouts.layout import Place
from .read import updates_in
from .unused import AlphaOfWhole, OnUnused, Reading

ParameterPlace = tuple[str, str, str]
"""Component, layer, and "weight" or "bias"."""

Change = Callable[[Tensor], Tensor]
"""W → W' − W, in fp32."""


def merge_file(
    model: Any,
    path: str | PathLike[str],
    weight: float = 1.0,
    *,
    on_unused: OnUnused = "error",
    alpha_of_whole: AlphaOfWhole = "ignored",
    revision: str | None = None,
    token: str | bool | None = None,
) -> int:
    """Merge an adapter file of any program into a pipeline's weights, for good: nothing is kept to unmerge it.

    KronA, LoKr, LoHa, LoRA, whole updates and the paper authors' checkpoints, with DoRA or without, and by LyCORIS'
    and PEFT's own code OFT, BOFT, GLoRA and (IA)³. The update is computed in fp32 and the sum rounded once. For
    adapters that stay adapters: `load_krona`.

    Args:
        model: a Diffusers pipeline, or any `torch.nn.Module`.
        path: a folder or file, or the id of a hub repository.
        weight: the adapter's strength.
        on_unused: "warn" to merge the rest of a file that also holds what this model has no place for; by default that
            is an error.
        alpha_of_whole: "applied" for LoKr files of programs that scale two whole factors by alpha / rank, which most
            do not.
        revision: branch, tag or commit of a hub repository.
        token: access token for the hub.

    Returns:
        How many layers changed.

    Raises:
        AdapterFileError: nothing readable there, or an adapter that does not fit this model.
        MergeError: some weight is quantized, would not be finite, or holds merged adapters. Nothing has changed then.
    """
    components = adaptable_components(model)
    source = resolve(path, revision=revision, token=token)
    updates = updates_in(source, components, Reading(on_unused, alpha_of_whole))
    merge_updates(updates, components, weight)
    return len(updates)


@torch.no_grad()
def merge_updates(updates: Mapping[Place, Update], components: Mapping[str, nn.Module], weight: float = 1.0) -> None:
    """Add what updates change to the weights and biases of layers, rounded once; to all of them or to none.

    Raises:
        AdapterFileError: an update does not fit its layer.
        MergeError: as `merge_file`.
    """
    for component in components.values():
        check_in_memory(component)
    changes = changes_of(updates)
    parameters = {place: _plain_parameter(components[place[0]], place) for place in changes}
    for place, base in parameters.items():
        if not bool(merged(base, changes[place](base), weight).isfinite().all()):
            raise MergeError(f"{'.'.join(filter(None, place))} would hold an infinity or a NaN. Nothing was merged.")
    for place, base in parameters.items():
        base.copy_(merged(base, changes[place](base), weight))


def changes_of(updates: Mapping[Place, Update]) -> dict[ParameterPlace, Change]:
    """What updates change in each layer's weight and bias, by component, layer, and "weight" or "bias"."""
    changes: dict[ParameterPlace, Change] = {}
    for (part, name), update in updates.items():
        if not update.bias_only:
            changes[part, name, "weight"] = update.change
        if update.bias is not None:
            changes[part, name, "bias"] = update.change_of_bias
    return changes


def merged(base: Tensor, change: Tensor, weight: float) -> Tensor:
    """base + weight · change, computed in fp32 or in the base's wider dtype and rounded to the base's."""
    wide = arithmetic_dtype(base.dtype)
    return (base.to(wide) + weight * change.to(wide)).to(base.dtype)


def _plain_parameter(component: nn.Module, place: ParameterPlace) -> Tensor:
    name, kind = ".".join(filter(None, place[:2])), place[2]
    layer: Any = component.get_submodule(place[1])
    if any(inner.merged_terms for inner in krona_layers(layer).values()):
        raise MergeError(f"{name} holds merged adapters, which could then not be unmerged: unmerge them first.")
    base = getattr(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer, kind, None)
    if not isinstance(base, Tensor):
        raise AdapterFileError(f"{name} is a {type(layer).__name__} without a {kind} that an update could go into.")
    if base.dtype not in MERGEABLE_DTYPES:
        raise MergeError(f"{name} keeps its {kind} as {base.dtype}: load the base unquantized. Nothing was merged.")
    return base
