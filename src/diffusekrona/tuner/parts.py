"""What copies parts of an adapted model gets: `ControlNetModel.from_unet` and its kin load a block's `state_dict()`.

With the names of an adapted model that fails, or where it is not strict, leaves weights out without a word. So the
state of a part of a model, asked for by itself, is that of the base: under its own names, and without factors. Merged
adapters are in its weights. The state of a whole model is as ever.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .compat import BaseTunerLayer, ModulesToSaveWrapper
from .layer import KronALayer

_HANDLE = "_krona_handle"
"""The attribute by which a part can take back what it was given."""


def give_parts_base_names(model: nn.Module) -> None:
    """Let the state of each part of a Diffusers model that holds adapters be that of its base."""
    for holder in model.modules():
        if hasattr(type(holder), "from_config"):
            for part in holder.modules():
                if part is not holder and _HANDLE not in vars(part) and _is_adapted(part):
                    vars(part)[_HANDLE] = part.register_state_dict_post_hook(_without_adapters)


def give_parts_back(model: nn.Module) -> None:
    """Undo `give_parts_base_names` where no adapter is left."""
    for part in model.modules():
        if _HANDLE in vars(part) and not _is_adapted(part):
            vars(part).pop(_HANDLE).remove()


def _is_adapted(part: nn.Module) -> bool:
    return not isinstance(part, BaseTunerLayer) and bool(_layers(part) or _wrappers(part))


def _without_adapters(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if prefix:
        return
    left_out: set[str] = set()
    for name, layer in _layers(module).items():
        left_out.update(adapter for adapter in layer.krona_A if adapter not in layer.merged_adapters)
        _drop(state, f"{name}.krona_")
        _rename(state, f"{name}.base_layer.", f"{name}.")
    for name, wrapper in _wrappers(module).items():
        left_out.update(wrapper.modules_to_save)
        within = f"{name}." if name else ""
        _drop(state, f"{within}modules_to_save.")
        _rename(state, f"{within}original_module.", within)
    if left_out:
        warnings.warn(
            f"The state of a part of an adapted model, a {type(module).__name__}, is that of its base, without the "
            f"adapter(s) {', '.join(sorted(left_out))}, which are not merged. To copy them with the part, as "
            "ControlNetModel.from_unet copies it, merge them first (merge_krona); to save them, use save_krona.",
            UserWarning,
            stacklevel=2,
        )


def _drop(state: dict[str, Any], prefix: str) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]


def _rename(state: dict[str, Any], before: str, after: str) -> None:
    for key in [key for key in state if key.startswith(before)]:
        state[after + key.removeprefix(before)] = state.pop(key)


def _layers(module: nn.Module) -> dict[str, KronALayer]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, KronALayer)}


def _wrappers(module: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in module.named_modules() if isinstance(part, ModulesToSaveWrapper)}
