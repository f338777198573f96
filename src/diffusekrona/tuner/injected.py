"""What an injected model holds: its layers, an adapter's tensors. And how an adapter is taken out of it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import BatchError, MergeError
from ..kron.exact import Keep, Term
from .batch import Batch
from .batched import BatchedLayer, CompiledBatchedLayer
from .compat import ADAPTED, BaseTunerLayer, ModulesToSaveWrapper
from .config import KronAConfig
from .layer import KronALayer, layers_beneath
from .names import unwrapped_name
from .parts import give_parts_back
from .projections import leave_fused


def krona_layers(model: nn.Module) -> dict[str, KronALayer]:
    """Every KronALayer of a model by its dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KronALayer)}


def adapter_tensors(model: nn.Module, adapter_name: str, *, here: bool = False) -> dict[str, Tensor]:
    """An adapter's own tensors in a model, by the names they are saved under.

    These are `<layer>.krona_A` and `<layer>.krona_B` (or `krona_B1` and `krona_B2`), and the whole state of each of
    its `modules_to_save`. A layer under another adapter's has the name that it has without, so it loads where that
    adapter is not. With `here`, factors that are offloaded come as what they hold, not as the parameters.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, KronALayer) and adapter_name in module.krona_A:
            factors = module.factors_here(adapter_name) if here else module.parameters_of(adapter_name)
            tensors.update({f"{name}.{key}": factor for key, factor in factors.items()})
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            state = module.modules_to_save[adapter_name].state_dict(keep_vars=True)
            tensors.update({f"{name}.{key}": tensor for key, tensor in state.items()})
    return {unwrapped_name(key): tensor for key, tensor in tensors.items()}


def terms_to_merge(
    layers: Mapping[str, KronALayer], adapter_names: list[str] | None, keep: Keep | None = None
) -> list[tuple[KronALayer, dict[str, list[Term]]]]:
    """What merging these adapters, or each layer's active ones, would put into each layer's weight.

    Args:
        layers: by name.
        adapter_names: which adapters; None for the active ones.
        keep: as in `KronALayer.check_mergeable`.

    Raises:
        MergeError: some layer cannot take it; none has changed.
    """
    planned = []
    for name, layer in layers.items():
        terms = layer.merge_terms(layer.active_adapters if adapter_names is None else adapter_names)
        try:
            layer.check_mergeable(terms, keep)
        except MergeError as error:
            raise MergeError(f"{name}: {error}. Nothing was merged.") from error
        planned.append((layer, terms))
    return planned


def merge_beneath_others(model: nn.Module, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Merge the layers beneath those of other methods, which PEFT would drop when it merges and unloads a model."""
    seen: set[Any] = set()
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and layer not in seen:
            beneath = list(layers_beneath(layer))
            seen.update(beneath)
            if not isinstance(layer, KronALayer):  # which merges what is beneath it itself
                for one in beneath:
                    one.merge(safe_merge=safe_merge, adapter_names=adapter_names)


@contextmanager
def adapters_by_sample(model: nn.Module, batch: Batch, compiled: bool = False) -> Iterator[None]:
    """Let each sample have the adapter that a batch names for it; gradients do not flow where the model is compiled.

    Raises:
        BatchError: one of them is merged into a weight, or trains whole modules, which are there for all samples.
    """
    layers = krona_layers(model)
    for name, layer in layers.items():
        if layer.merged_adapters:
            raise BatchError(
                f"{name} holds merged adapters ({', '.join(layer.merged_adapters)}), which every sample would have: "
                "unmerge them first."
            )
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    for chosen in filter(None, dict.fromkeys(batch.names)):
        if chosen in configs and getattr(configs[chosen], "modules_to_save", None):
            raise BatchError(f"The adapter {chosen!r} trains whole modules, which every sample would have.")
    before = [(layer, layer.batched) for layer in layers.values()]
    for layer in layers.values():
        layer.batched = (CompiledBatchedLayer if compiled and not layer.kernel else BatchedLayer)(layer, batch)
    try:
        yield
    finally:
        for layer, other in before:
            layer.batched = other


@contextmanager
def undone_on_error(models: Iterable[nn.Module], adapter_name: str) -> Iterator[None]:
    """Where the block fails, remove the adapter that it was adding, and leave the models as they were."""
    models = list(models)
    trainable = [(parameter, parameter.requires_grad) for m in models for parameter in m.parameters()]
    active = [(module, module.active_adapters) for model in models for module in _switches(model)]
    # PEFT unmerges a model when it adds an adapter.
    merged = [(layer, layer.merged_terms, layer.kept) for model in models for layer in krona_layers(model).values()]
    try:
        yield
    except BaseException:
        for model in models:
            remove_adapter(model, adapter_name)
        for module, names in active:
            module.set_adapter(names)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        for layer, terms, kept in merged:
            layer.set_merged(terms, kept)
        raise


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of a model: factors, config, `modules_to_save`, and each KronALayer left with none.

    Merged factors come out of the base weights first, bit for bit. Where the adapter was active, the newest
    other Kronecker adapter becomes active. No parameter that stays becomes trainable or frozen.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    configs.pop(adapter_name, None)
    others = [name for name, config in configs.items() if isinstance(config, KronAConfig)]
    layers = krona_layers(model).values()
    active = next((layer.active_adapters for layer in layers if adapter_name in layer.active_adapters), None)
    if active is not None:
        _activate(model, [name for name in active if name != adapter_name] or others[-1:])
    for layer in layers:
        layer.delete_adapter(adapter_name)
    remove_leftovers(model)
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)


def remove_leftovers(model: nn.Module) -> None:
    """Remove what stays of adapters that Diffusers deleted or failed to add: copies, empty layers, flag."""
    configs = getattr(model, "peft_config", None) or {}
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            for adapter in set(module.modules_to_save) - set(configs):
                module.delete_adapter(adapter, module.active_adapters)
            if not module.modules_to_save:
                model.set_submodule(name, module.original_module)
    for name, layer in krona_layers(model).items():
        if not layer.krona_A:
            layer.unmerge()
            if layer.fused_rows is not None:
                layer.fused_rows.remove()
            model.set_submodule(name, layer.base_layer)
    leave_fused(model)
    give_parts_back(model)
    if not configs:
        for attribute in ("peft_config", ADAPTED):
            vars(model).pop(attribute, None)


def _switches(model: nn.Module) -> list[KronALayer | ModulesToSaveWrapper]:
    return [module for module in model.modules() if isinstance(module, (KronALayer, ModulesToSaveWrapper))]


def _activate(model: nn.Module, adapter_names: list[str]) -> None:
    for module in _switches(model):
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([name for name in adapter_names if name in module.modules_to_save][:1])
        else:
            module.set_adapter(adapter_names)
