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
from .read import Place, updates_in


def merge_file(
    model: Any,
    path: str | PathLike[str],
    weight: float = 1.0,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> int:
    """Merge an adapter file of any program into a pipeline's weights, for good: nothing is kept to unmerge it.

    KronA, LoKr, LoHa, LoRA, whole updates and the paper authors' checkpoints, with DoRA or without; the update is
    computed in fp32 and the sum rounded once. For adapters that stay adapters: `load_krona`.

    Args:
        model: a Diffusers pipeline, or any `torch.nn.Module`.
        path: a folder or file, or the id of a hub repository.
        weight: the adapter's strength.
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
    updates = updates_in(source, components)
    merge_updates({place: update.change for place, update in updates.items()}, components, weight)
    return len(updates)


@torch.no_grad()
def merge_updates(
    changes: Mapping[Place, Callable[[Tensor], Tensor]], components: Mapping[str, nn.Module], weight: float = 1.0
) -> None:
    """W += weight · change(W) for the layers at these places, rounded once; all of them or none.

    Raises:
        AdapterFileError: a change does not fit its layer.
        MergeError: as `merge_file`.
    """
    for component in components.values():
        check_in_memory(component)
    weights = {place: _plain_weight(components[place[0]], place) for place in changes}
    for place, base in weights.items():
        if not bool(merged(base, changes[place](base), weight).isfinite().all()):
            raise MergeError(f"{'.'.join(filter(None, place))} would hold an infinity or a NaN. Nothing was merged.")
    for place, base in weights.items():
        base.copy_(merged(base, changes[place](base), weight))


def merged(base: Tensor, change: Tensor, weight: float) -> Tensor:
    """base + weight · change, computed in fp32 or in the base's wider dtype and rounded to the base's."""
    wide = arithmetic_dtype(base.dtype)
    return (base.to(wide) + weight * change.to(wide)).to(base.dtype)


def _plain_weight(component: nn.Module, place: Place) -> Tensor:
    name = ".".join(filter(None, place))
    layer: Any = component.get_submodule(place[1])
    if any(inner.merged_terms for inner in krona_layers(layer).values()):
        raise MergeError(f"{name} holds merged adapters, which could then not be unmerged: unmerge them first.")
    base = layer.get_base_layer().weight if isinstance(layer, BaseTunerLayer) else getattr(layer, "weight", None)
    if not isinstance(base, Tensor):
        raise AdapterFileError(f"{name} is a {type(layer).__name__} without a weight that an update could go into.")
    if base.dtype not in MERGEABLE_DTYPES:
        raise MergeError(f"{name} keeps its weight as {base.dtype}: load the base unquantized. Nothing was merged.")
    return base
