"""The helpers for a Diffusers pipeline or any single module: inject, save, load, merge, unmerge, unload, hot swap.

Each checks everything first, and either finishes or leaves the pipeline as it was, bit for bit.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import AdapterFileError, AdapterNameError, ConfigError, MergeError
from .files.formats import Format
from .files.formats.krona import SavedAdapter
from .files.read import read_adapters
from .files.unused import AlphaOfWhole, OnUnused, Reading
from .files.write import check_format, write
from .kron.exact import Keep
from .storage import resolve
from .tuner.compat import NoMatchingPeftModuleError
from .tuner.components import (
    adaptable_components,
    adapter_names,
    all_modules,
    check_free_name,
    forget,
    mark_adapted,
    named_adapter,
    remember,
    restore,
)
from .tuner.config import KronAConfig
from .tuner.injected import (
    adapter_tensors,
    krona_layers,
    remove_adapter,
    remove_leftovers,
    terms_to_merge,
    undone_on_error,
)
from .tuner.layer import KronALayer
from .tuner.memory import has_room_for_copies
from .tuner.merged import check_in_memory
from .tuner.model import KronAModel
from .tuner.names import factor_name, in_component, is_denoiser, layer_of, unwrapped_name
from .tuner.targets import layer_scale


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
        """Names and parameters: the factors, and those of the modules that `modules_to_save` trains."""
        for part, component in self.components.items():
            for key, tensor in adapter_tensors(component, self.name).items():
                if isinstance(tensor, nn.Parameter):
                    yield in_component(part, key), tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """What to hand to an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def __repr__(self) -> str:
        total = sum(parameter.numel() for parameter in self.parameters())
        parts = ", ".join(part or type(module).__name__ for part, module in self.components.items())
        return f"InjectedAdapter({self.name!r} in {parts}: {total:,} parameters)"


def inject_krona(
    model: Any,
    config: KronAConfig | None = None,
    adapter_name: str = "default",
    *,
    text_encoders: bool | Iterable[str] = False,
    denoiser: bool = True,
) -> InjectedAdapter:
    """Freeze a pipeline or module, and put a new, trainable adapter into it as the active KronA adapter.

    Other adapters stay, inactive; those that are merged are unmerged, as PEFT does.

    Args:
        model: a Diffusers pipeline, or any `torch.nn.Module`.
        config: which layers and which factors; the paper's best settings by default.
        adapter_name: what to call it.
        text_encoders: in a pipeline, adapt its text encoders, too, as the paper does for SD 1.x, or just those of some
            names, such as `["text_encoder_2"]`. By default only the denoiser is adapted, as it does for SDXL
            (Section 3.2).
        denoiser: False to adapt text encoders alone.

    Returns:
        The adapter; hand its `parameters()` to any optimizer. The factors are fp32 whatever the base's dtype.

    Raises:
        FactorShapeError: a targeted layer cannot take its factors.
        AdapterNameError: the name is taken.
        ConfigError: the pipeline has no text encoder of such a name, or nothing is to be adapted.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> krona = inject_krona(model, KronAConfig(a1=4, a2=8, target_modules=["0"]))
        >>> {name: tuple(factor.shape) for name, factor in krona.named_parameters()}
        {'0.krona_A': (4, 8), '0.krona_B': (16, 16)}
        >>> sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        288
    """
    found = adaptable_components(model)
    check_free_name(found.values(), adapter_name)
    encoders = _encoders(text_encoders, [part for part in found if not is_denoiser(part)])
    chosen = {part: module for part, module in found.items() if part in encoders or (denoiser and is_denoiser(part))}
    if not chosen:
        raise ConfigError("Without the denoiser there is nothing to adapt here: name text_encoders, or leave it in.")
    adapter = InjectedAdapter(adapter_name, chosen)
    _inject(model, adapter, dict.fromkeys(chosen, config or KronAConfig()), freeze=True)
    return adapter


def _encoders(wanted: bool | Iterable[str], there: list[str]) -> list[str]:
    """The text encoders that are wanted, of those that a model has."""
    if not wanted or wanted is True:
        return there if wanted else []
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if unknown := [name for name in names if name not in there]:
        raise ConfigError(
            f"text_encoders must be some of those that this model has, {', '.join(there) or 'which are none'}; it "
            f"names {', '.join(map(repr, unknown))}."
        )
    return names


def save_krona(
    model: Any,
    path: str | PathLike[str],
    adapter_name: str | None = None,
    *,
    format: Format = "krona",
    whole: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Save an adapter: to one self-contained file if `path` ends in .safetensors, else to a PEFT folder.

    Args:
        model: the pipeline or module that holds the adapter.
        path: `my-dog` or `my-dog.safetensors`.
        adapter_name: which adapter; may be left out while there is just one.
        format: "krona", ours. For other programs, a single LoKr file with the names that they read: "comfyui",
            "kohya", "diffusers", "sdnext" or "invokeai"; "lokr" is "comfyui" and "lokr-diffusers" is "diffusers".
            "lora" is the same update as an exact LoRA of rank(A)·rank(B), which loads everywhere and is far larger.
        whole: multiply out each B that is a product (`b_rank`), for programs that do not read it so.
        metadata: header entries of a file for other programs, beside those that are known here, such as
            `{"ss_steps": "1000"}`.

    Returns:
        The path written to.

    Raises:
        AdapterNameError: no such adapter.
        AdapterFileError: the factors are not finite, the format cannot hold this adapter, or the program reads no
            adapter of this model; nothing was written.
        OSError: the file cannot be written; an older one there is as it was.
    """
    check_format(format)
    components = adaptable_components(model)
    name = named_adapter(components, adapter_name)
    adapters = {part: _saved(module, name) for part, module in components.items() if name in adapter_names(module)}
    for part, saved in adapters.items():
        for key, tensor in saved.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterFileError(f"{key} of {part or 'the model'} holds an infinity or a NaN; nothing was saved.")
    target = Path(path).expanduser()
    write(target, adapters, components, format, metadata, whole)
    return target


def load_krona(
    model: Any,
    path: str | PathLike[str],
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    components: Iterable[str] | None = None,
    on_unused: OnUnused = "error",
    alpha_of_whole: AlphaOfWhole = "ignored",
    revision: str | None = None,
    token: str | bool | None = None,
) -> InjectedAdapter:
    """Load a saved adapter into a pipeline or module as the active KronA adapter.

    Other adapters stay, inactive; those that are merged are unmerged, as PEFT does.

    Args:
        model: the pipeline or module to load into.
        path: what `save_krona` wrote, a folder or a file; what PEFT or Diffusers wrote for a KronA adapter; a LoKr
            file of any program, whose fused projections become those of this model; or the id of a hub repository
            that holds one of these.
        adapter_name: what to call it here.
        trainable: freeze everything else, as `inject_krona` does, and train on.
        components: load just the file's parts for these, such as `["unet"]`; by default all that it holds, and one that
            the pipeline lacks is an error.
        on_unused: "warn" to load the rest of a file that also holds what this model has no place for; by default that
            is an error.
        alpha_of_whole: "applied" for LoKr files of programs that scale two whole factors by alpha / rank, which most
            do not.
        revision: branch, tag or commit of a hub repository.
        token: access token for the hub.

    Raises:
        AdapterFileError: nothing readable there, or an adapter that does not fit this model.
        AdapterNameError: the name is taken.
        ConfigError: the model has no component of such a name.
    """
    found = adaptable_components(model)
    wanted = _wanted(components, found)
    check_free_name(found.values(), adapter_name)
    source = resolve(path, revision=revision, token=token)
    saved = read_adapters(source, found, Reading(on_unused, alpha_of_whole), wanted)
    return put_adapter(model, saved, adapter_name, trainable=trainable)


def put_adapter(
    model: Any, saved: Mapping[str, SavedAdapter], adapter_name: str, *, trainable: bool = False
) -> InjectedAdapter:
    """Put an adapter that was read, by component, into a model as the active KronA adapter; `load_krona` has the rest.

    Raises:
        AdapterNameError: the name is taken.
    """
    found = adaptable_components(model)
    check_free_name(found.values(), adapter_name)
    configs = {part: copy.deepcopy(one.config) for part, one in saved.items()}
    for config in configs.values():
        config.inference_mode = not trainable
    adapter = InjectedAdapter(adapter_name, {part: found[part] for part in saved})
    _inject(model, adapter, configs, {part: one.tensors for part, one in saved.items()}, freeze=trainable)
    return adapter


def _wanted(components: Iterable[str] | None, found: Mapping[str, nn.Module]) -> set[str] | None:
    if components is None:
        return None
    wanted = {components} if isinstance(components, str) else set(components)
    if not wanted or not wanted <= found.keys():
        raise ConfigError(
            f"components must be some of what this model has, {', '.join(filter(None, found)) or 'which is none'}; "
            f"it is {sorted(wanted)}."
        )
    return wanted


Exact = Literal["copy"] | bool

_KEPT: dict[Exact, Keep] = {True: "entries", "copy": "copy", False: "nothing"}


def merge_krona(model: Any, adapter_names: str | list[str] | None = None, *, exact: Exact = True) -> None:
    """Fold s · A ⊗ B into the frozen weights, in place; generating then costs what the base model costs.

    Args:
        model: the pipeline or module that holds the adapters.
        adapter_names: which adapters, each with its weight as set by `pipe.set_adapters`; by default the
            active ones.
        exact: what unmerging gives back. True is every bit, for which the weights are kept that a subtraction would
            not bring back. "copy" is every bit, too, out of a copy of the weights; where a device has not twice the
            memory that this takes, it is the same as True. False is the weights to rounding: merging is an addition,
            unmerging subtracts, and warns. The merged weights are the same bits whatever it is, and quantized weights
            come back exactly whatever it is.

    Raises:
        ConfigError: `exact` is none of these.
        MergeError: some weight would not be finite, or is quantized in a format that cannot be written back; or it
            holds adapters that were merged with False, and now it is not, or the other way round. Nothing has changed
            then.
        AdapterNameError: no adapter has one of the names, or there is none at all.
    """
    if exact not in _KEPT:
        raise ConfigError(f'exact must be True, "copy" or False; it is {exact!r}.')
    keep = _KEPT[exact]
    components = adaptable_components(model)
    names = _known(components, adapter_names)
    layers = _layers(components)
    if not layers:
        raise AdapterNameError("There is no KronA adapter to merge; add one with inject_krona or load_krona.")
    for component in components.values():
        check_in_memory(component)
    planned = terms_to_merge(layers, names, keep)
    if keep == "copy" and not has_room_for_copies(layer for layer, _ in planned):
        keep = "entries"
    for layer, terms in planned:
        layer.set_merged(terms, keep)


def unmerge_krona(model: Any, adapter_names: str | list[str] | None = None) -> None:
    """Take merged adapters, by default all, out of the weights; with none left these are as before, bitwise.

    To rounding, and with a warning, where they were merged with `exact=False`.

    Raises:
        MergeError: the weights were cast to another dtype while merged. Nothing has changed then.
        AdapterNameError: no adapter has one of the names.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(128, 64)).bfloat16()
        >>> before = model[0].weight.clone()
        >>> krona = inject_krona(model, KronAConfig(a1=4, a2=8, target_modules=["0"], init_weights=False))
        >>> merge_krona(model)
        >>> torch.equal(model[0].weight, before)
        False
        >>> unmerge_krona(model)
        >>> torch.equal(model[0].weight, before)
        True
    """
    components = adaptable_components(model)
    names = _known(components, adapter_names)
    layers = _layers(components)
    _check_unmergeable(layers)
    for layer in layers.values():
        layer.unmerge(names)


def unload_krona(model: Any, adapter_name: str | None = None) -> None:
    """Remove an adapter, or every KronA adapter, and leave the pipeline as if it had never been there.

    Merged adapters are unmerged first, as by `unmerge_krona`. To keep the merged weights and drop the factors, use
    Diffusers' `pipe.unload_lora_weights()` or PEFT's `merge_and_unload()` instead.

    Raises:
        AdapterNameError: no adapter has that name.
        MergeError: the weights were cast to another dtype while merged. Nothing has changed then.
    """
    components = adaptable_components(model)
    if adapter_name is not None:
        named_adapter(components, adapter_name)
    _check_unmergeable(_layers(components))
    for component in components.values():
        for name in adapter_names(component):
            if adapter_name in (None, name):
                remove_adapter(component, name)
        remove_leftovers(component)
    if not any(adapter_names(component) for component in components.values()):
        restore(all_modules(model))


def _inject(
    model: Any,
    adapter: InjectedAdapter,
    configs: Mapping[str, KronAConfig],
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    *,
    freeze: bool,
) -> None:
    modules = all_modules(model)
    noted = remember(modules)
    try:
        with undone_on_error(modules, adapter.name), warnings.catch_warnings():
            # PEFT warns of every adapter after the first.
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            if len(adapter.components) > 1:
                # A pattern may be meant for another component.
                warnings.filterwarnings("ignore", r".*(factor|alpha)_pattern", RuntimeWarning)
            for part, component in adapter.components.items():
                try:
                    KronAModel(component, copy.deepcopy(configs[part]), adapter.name, factors=(tensors or {}).get(part))
                except NoMatchingPeftModuleError as error:
                    raise ConfigError(
                        f"target_modules fits no layer of the {part or type(component).__name__}: {error} It takes "
                        "names, a regular expression that matches whole names, or a word such as 'attention'."
                        + _list_to_name(configs[part])
                    ) from error
                mark_adapted(component)
                if tensors is not None:
                    _fill_copies(component, adapter.name, tensors[part])
    except BaseException:
        forget(noted)
        raise
    if freeze:
        own = set(adapter.parameters())
        for parameter in (p for module in noted for p in module.parameters() if p not in own):
            parameter.requires_grad_(False)


def _list_to_name(config: KronAConfig) -> str:
    """What else to do about a config that fits no layer: PEFT finds no index in a name that begins with its list's."""
    if config.layers_to_transform is None or config.layers_pattern:
        return ""
    return " Give layers_pattern, too: the name of the list of layers that layers_to_transform counts in."


@torch.no_grad()
def _fill_copies(component: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill the modules that an adapter trains in full."""
    for key, tensor in adapter_tensors(component, adapter_name).items():
        if not layer_of(key):
            tensor.copy_(tensors[key])


def _saved(component: nn.Module, adapter_name: str) -> SavedAdapter:
    configs: Any = component.peft_config
    config = copy.deepcopy(configs[adapter_name])
    config.inference_mode = True
    tensors = adapter_tensors(component, adapter_name, here=True)
    return SavedAdapter(config, {key: tensor.detach() for key, tensor in tensors.items()})


def _layers(components: Mapping[str, nn.Module]) -> dict[str, KronALayer]:
    return {
        in_component(part, name): layer
        for part, component in components.items()
        for name, layer in krona_layers(component).items()
    }


def _known(components: dict[str, nn.Module], names: str | list[str] | None) -> list[str] | None:
    """The names as a list, each checked; None for None."""
    if names is None:
        return None
    return [named_adapter(components, name) for name in ([names] if isinstance(names, str) else names)]


def _check_unmergeable(layers: Mapping[str, KronALayer]) -> None:
    for name, layer in layers.items():
        try:
            layer.check_unmergeable()
        except MergeError as error:
            raise MergeError(f"{name}: {error}. Nothing was unmerged.") from error


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
        path: an adapter as `load_krona` reads it, with the same layers, shapes, layout and `modules_to_save`.
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
    saved = read_adapters(source, components)
    adapted = [part for part, component in components.items() if name in adapter_names(component)]
    if set(saved) != set(adapted):
        raise AdapterFileError(
            f"{source} holds an adapter for {_parts(saved)}, but {name!r} is one for {_parts(adapted)}; "
            "only equal adapters can be swapped; load it with load_krona after unload_krona."
        )
    for part, one in saved.items():
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
    for key, layer in _swappable(component, name):
        if name in layer.merged_adapters:
            raise MergeError(f"The adapter {name!r} is merged into {key}; unmerge it before it is swapped.")
        if layer.layout[name] != saved.config.layout:
            problems.append(f"{key} has the layout {layer.layout[name]!r}, not {saved.config.layout!r}")
        if layer.alpha[name] == 0 and layer_scale(saved.config, key) != 0:
            problems.append(f"{key} has the scale 0, which no factor can make up for")
    if problems:
        raise AdapterFileError(
            f"{saved.source} cannot take the place of {name!r} in this {type(component).__name__}, which is "
            f"unchanged: {'; '.join(problems[:3])}. Give it another adapter_name and load it beside that one with "
            "load_krona."
        )


@torch.no_grad()
def _swap(component: nn.Module, name: str, saved: SavedAdapter) -> None:
    tensors = dict(saved.tensors)
    for key, layer in _swappable(component, name):
        alpha, new = layer.alpha[name], layer_scale(saved.config, key)
        if new != alpha:
            a_name = factor_name(key, "A")
            tensors[a_name] = tensors[a_name].double() * (new / alpha)
    for key, tensor in adapter_tensors(component, name).items():
        tensor.copy_(tensors[key])


def _swappable(component: nn.Module, name: str) -> Iterator[tuple[str, KronALayer]]:
    """The adapter's layers, by the names that they are saved under."""
    for key, layer in krona_layers(component).items():
        if name in layer.krona_A:
            yield unwrapped_name(key), layer


def _parts(parts: Any) -> str:
    return ", ".join(part or "a single model" for part in parts)
