"""The helpers for a whole Diffusers pipeline, or for any single module: inject, save, load, merge, unmerge, unload.

Each checks everything first, and either finishes or leaves the pipeline as it was, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from .components import (
    TEXT_ENCODERS,
    adaptable_components,
    adapter_names,
    check_free_name,
    is_denoiser,
    is_pipeline,
    mark_adapted,
    named_adapter,
    remember,
    remove_from,
    restore,
)
from .config import KronAConfig
from .errors import AdapterFileError, KronAError, MergeError
from .fit import check_fit
from .formats import krona as krona_format
from .formats.hub import resolve
from .formats.krona import SavedAdapter
from .layer import KronALayer
from .model import krona_layers


class InjectedAdapter:
    """An adapter that `inject_krona` or `load_krona` put into a model.

    Attributes:
        name: the adapter's name.
        components: component name → the module it went into; "" for a single module.
    """

    def __init__(self, name: str, components: dict[str, nn.Module]) -> None:
        self.name = name
        self.components = components

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the adapter: factors, and the modules that `modules_to_save` trains in full."""
        for part, component in self.components.items():
            for key, parameter in component.named_parameters():
                if key.endswith(f".{self.name}") or f".{self.name}." in key:
                    yield (f"{part}.{key}" if part else key), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """What to hand to an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def __repr__(self) -> str:
        total = sum(parameter.numel() for parameter in self.parameters())
        parts = ", ".join(part or type(module).__name__ for part, module in self.components.items())
        return f"InjectedAdapter({self.name!r} in {parts}: {total:,} parameters)"


def inject_krona(
    model: Any, config: KronAConfig | None = None, adapter_name: str = "default", *, text_encoders: bool = False
) -> InjectedAdapter:
    """Freeze a pipeline or module and put a new, trainable adapter into it.

    Args:
        model: a Diffusers pipeline, or any `torch.nn.Module`.
        config: which layers and which factors; the paper's best settings by default.
        adapter_name: what to call it.
        text_encoders: in a pipeline, adapt its text encoders, too, as the paper does for SD 1.x. By default only the
            denoiser is adapted, as it does for SDXL (Section 3.2).

    Returns:
        The adapter; hand its `parameters()` to any optimizer. The factors are fp32 whatever the base's dtype.

    Raises:
        FactorShapeError: a targeted layer cannot take its factors.
        AdapterNameError: the name is taken.
    """
    found = adaptable_components(model)
    chosen = {
        part: module
        for part, module in found.items()
        if is_denoiser(part) or (text_encoders and part in TEXT_ENCODERS)
    }
    check_free_name(found.values(), adapter_name)
    _inject(model, chosen, adapter_name, dict.fromkeys(chosen, config or KronAConfig()))
    return InjectedAdapter(adapter_name, chosen)


def save_krona(model: Any, path: str | PathLike[str], adapter_name: str | None = None) -> Path:
    """Save an adapter: to one self-contained file if `path` ends in .safetensors, else to a folder that PEFT reads, too.

    Args:
        model: the pipeline or module that holds the adapter.
        path: `my-dog` or `my-dog.safetensors`.
        adapter_name: which adapter; may be left out while there is just one.

    Returns:
        The path written to.

    Raises:
        AdapterNameError: no such adapter.
        AdapterFileError: the factors are not finite; nothing was written.
        OSError: the file cannot be written; an older one there is as it was.
    """
    components = adaptable_components(model)
    name = named_adapter(components, adapter_name)
    adapters = {part: _saved(module, name) for part, module in components.items() if name in adapter_names(module)}
    for part, saved in adapters.items():
        for key, tensor in saved.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterFileError(f"{key} of {part or 'the model'} holds an infinity or a NaN; nothing was saved.")
    krona_format.write(Path(path), adapters)
    return Path(path)


def load_krona(
    model: Any,
    path: str | PathLike[str],
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> InjectedAdapter:
    """Load a saved adapter into a pipeline or module, beside any others there, and make it the active KronA adapter.

    Args:
        model: the pipeline or module to load into.
        path: what `save_krona` wrote, a folder or a file; what PEFT or Diffusers wrote for a KronA adapter; or the id
            of a hub repository that holds one of these.
        adapter_name: what to call it here.
        trainable: leave its factors trainable, to train on.
        revision: branch, tag or commit of a hub repository.
        token: access token for the hub.

    Raises:
        AdapterFileError: nothing readable there, or an adapter that does not fit this model.
        AdapterNameError: the name is taken.
    """
    found = adaptable_components(model)
    check_free_name(found.values(), adapter_name)
    source = resolve(path, revision=revision, token=token)
    saved = _by_component(krona_format.read(source), found, source)
    for part, adapter in saved.items():
        check_fit(found[part], adapter)
    configs = {part: copy.deepcopy(adapter.config) for part, adapter in saved.items()}
    for config in configs.values():
        config.inference_mode = not trainable
    chosen = {part: found[part] for part in saved}
    _inject(model, chosen, adapter_name, configs, {part: adapter.tensors for part, adapter in saved.items()})
    return InjectedAdapter(adapter_name, chosen)


def merge_krona(model: Any, adapter_names: list[str] | None = None) -> None:
    """Fold s · A ⊗ B into the frozen weights, in place; generating then costs what the base model costs.

    Args:
        model: the pipeline or module that holds the adapters.
        adapter_names: which adapters, each with its weight as set by `pipe.set_adapters`; by default the active ones.

    Raises:
        MergeError: some weight would not be finite, or is quantized. Nothing has changed then.
        AdapterNameError: no adapter has one of the names.
    """
    components = adaptable_components(model)
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    for name in names or [None]:
        named_adapter(components, name) if names else _any_adapter(components)
    planned = []
    for name, layer in _layers(components).items():
        wanted = [n for n in names or layer.active_adapters if n in layer.krona_A and n not in layer.merged_adapters]
        terms = layer.merge_terms(wanted) if wanted else {}
        if not terms:
            continue
        try:
            layer.check_mergeable(terms)
        except MergeError as error:
            raise MergeError(f"{name}: {error}. Nothing was merged.") from error
        planned.append((layer, terms))
    for layer, terms in planned:
        layer.set_merged(terms)


def unmerge_krona(model: Any, adapter_names: list[str] | None = None) -> None:
    """Take merged adapters, by default all, out of the weights again; with none left they are what they were, bitwise.

    Raises:
        MergeError: the weights were cast to another dtype while merged.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    layers = _layers(adaptable_components(model))
    for name, layer in layers.items():
        try:
            layer.check_unmergeable()
        except MergeError as error:
            raise MergeError(f"{name}: {error}. Nothing was unmerged.") from error
    for layer in layers.values():
        layer.unmerge(names)


def unload_krona(model: Any, adapter_name: str | None = None) -> None:
    """Remove an adapter, or every KronA adapter, and leave the pipeline as if it had never been there.

    Merged adapters are unmerged first, bit for bit. To keep the merged weights and drop the factors, use Diffusers'
    `pipe.unload_lora_weights()` or PEFT's `merge_and_unload()` instead.

    Raises:
        AdapterNameError: no adapter has that name.
    """
    components = adaptable_components(model)
    if adapter_name is not None:
        named_adapter(components, adapter_name)
    for component in components.values():
        for name in adapter_names(component):
            if adapter_name in (None, name):
                remove_from(component, name)
    if not any(adapter_names(component) for component in components.values()):
        restore(_modules(model))


def _inject(
    model: Any,
    components: dict[str, nn.Module],
    adapter_name: str,
    configs: dict[str, KronAConfig],
    tensors: dict[str, dict[str, Tensor]] | None = None,
) -> None:
    active = {layer: layer.active_adapters for layer in _layers(components).values()}
    noted = remember(_modules(model))
    try:
        for part, component in components.items():
            inject_adapter_in_model(copy.deepcopy(configs[part]), component, adapter_name)
            mark_adapted(component)
            if tensors is not None:
                set_peft_model_state_dict(component, tensors[part], adapter_name)
    except BaseException:
        for component in components.values():
            remove_from(component, adapter_name)
        for layer, names in active.items():
            layer.set_adapter(names)
        restore(noted)
        raise
    for module in noted:
        for name, parameter in module.named_parameters():
            if f".{adapter_name}" not in name:
                parameter.requires_grad_(False)


def _saved(component: nn.Module, adapter_name: str) -> SavedAdapter:
    config = copy.deepcopy(component.peft_config[adapter_name])
    config.inference_mode = True
    tensors = get_peft_model_state_dict(component, adapter_name=adapter_name, save_embedding_layers=False)
    # A layer under another adapter's is saved under its own name, so that it loads where that adapter is not.
    return SavedAdapter(config, {key.replace(".base_layer.", "."): tensor for key, tensor in tensors.items()})


def _by_component(
    saved: dict[str, SavedAdapter], found: dict[str, nn.Module], source: Path
) -> dict[str, SavedAdapter]:
    if set(saved) <= set(found):
        return saved
    denoisers = [part for part in saved if is_denoiser(part)]
    target = next(iter(found))
    if len(denoisers) == 1 and (list(saved) == denoisers or target == ""):
        return {target: saved[denoisers[0]]}
    raise AdapterFileError(
        f"{source} holds an adapter for {', '.join(sorted(saved))}, but this model has "
        f"{', '.join(part or 'no named components' for part in found)}."
    )


def _modules(model: Any) -> list[nn.Module]:
    adapted = adaptable_components(model)
    others = model.components if is_pipeline(model) else {}
    return [*adapted.values(), *(m for part, m in others.items() if isinstance(m, nn.Module) and part not in adapted)]


def _layers(components: dict[str, nn.Module]) -> dict[str, KronALayer]:
    return {
        f"{part}.{name}" if part else name: layer
        for part, component in components.items()
        for name, layer in krona_layers(component).items()
    }


def _any_adapter(components: dict[str, nn.Module]) -> None:
    if not any(adapter_names(component) for component in components.values()):
        raise KronAError("There is no KronA adapter to merge; add one with inject_krona or load_krona.")
