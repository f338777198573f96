"""Another adapter in the place of one that a model has, without a new compilation of a compiled model."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterFileError, MergeError
from .files.fit import check_fit
from .files.formats import krona as krona_format
from .files.formats.krona import SavedAdapter
from .files.saved import by_component
from .storage import resolve
from .tuner.components import adaptable_components, adapter_names, named_adapter
from .tuner.injected import adapter_tensors, krona_layers
from .tuner.layer import KronALayer
from .tuner.targets import layer_alpha


def hotswap_krona(
    model: Any,
    path: str | PathLike[str],
    adapter_name: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Put a saved adapter in the place of one that a model has, by new values in the same tensors.

    A model that was compiled runs on without being compiled anew. To compiled code a scale is a constant, so the
    adapter's alpha stays what it is, and where the saved one has another, A is multiplied by the quotient: the update
    is the saved one, with one more rounding of A unless the quotient is a power of two. The adapter keeps its name, its
    config, its weight as set by `pipe.set_adapters`, and its dtype.

    Args:
        model: the pipeline or module, compiled or not, that has the adapter.
        path: a KronA adapter as `load_krona` reads it, with the same layers, shapes, layout and `modules_to_save`.
        adapter_name: which adapter to replace; may be left out while there is just one.
        revision: branch, tag or commit of a hub repository.
        token: access token for the hub.

    Raises:
        AdapterFileError: nothing readable there, or an adapter of other shapes. Nothing has changed then.
        AdapterNameError: no such adapter.
        MergeError: the adapter is merged.
    """
    components = adaptable_components(model)
    name = named_adapter(components, adapter_name)
    source = resolve(path, revision=revision, token=token)
    saved = by_component(krona_format.read(source), components, source)
    adapted = [part for part, component in components.items() if name in adapter_names(component)]
    if set(saved) != set(adapted):
        raise AdapterFileError(
            f"{source} holds an adapter for {_parts(saved)}, but {name!r} is one for {_parts(adapted)}; "
            "only equal adapters can be swapped."
        )
    for part, one in saved.items():
        check_fit(components[part], one)
        _check_equal(components[part], name, one)
    for part, one in saved.items():
        _swap(components[part], name, one)


def _check_equal(component: nn.Module, name: str, saved: SavedAdapter) -> None:
    """Raise unless the saved tensors can take the place of the adapter's."""
    present = {key: tuple(tensor.shape) for key, tensor in adapter_tensors(component, name).items()}
    new = {key: tuple(tensor.shape) for key, tensor in saved.tensors.items()}
    differing = [key for key in present.keys() | new.keys() if present.get(key) != new.get(key)]
    problems = []
    if differing:
        problems.append(f"{len(differing)} tensor(s) such as {min(differing)} differ in shape or are in one only")
    for key, layer in _layers(component, name):
        if name in layer.merged_adapters:
            raise MergeError(f"The adapter {name!r} is merged into {key}; unmerge it before it is swapped.")
        if layer.layout[name] != saved.config.layout:
            problems.append(f"{key} has the layout {layer.layout[name]!r}, not {saved.config.layout!r}")
        if layer.alpha[name] == 0 and layer_alpha(saved.config, key) != 0:
            problems.append(f"{key} has the scale 0, which no factor can make up for")
    if problems:
        raise AdapterFileError(
            f"{saved.source} cannot take the place of {name!r} in this {type(component).__name__}, which is "
            f"unchanged: {'; '.join(problems[:3])}. Load it beside that one with load_krona instead."
        )


@torch.no_grad()
def _swap(component: nn.Module, name: str, saved: SavedAdapter) -> None:
    tensors = dict(saved.tensors)
    for key, layer in _layers(component, name):
        alpha, new = layer.alpha[name], layer_alpha(saved.config, key)
        if new != alpha:
            A: Tensor = tensors[f"{key}.krona_A"]
            tensors[f"{key}.krona_A"] = A.double() * (new / alpha)
    for key, tensor in adapter_tensors(component, name).items():
        tensor.copy_(tensors[key])


def _layers(component: nn.Module, name: str) -> Iterator[tuple[str, KronALayer]]:
    """The adapter's layers, by the names that they are saved under."""
    for key, layer in krona_layers(component).items():
        if name in layer.krona_A:
            yield key.replace(".base_layer", ""), layer


def _parts(parts: Any) -> str:
    return ", ".join(part or "a single model" for part in parts)
