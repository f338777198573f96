"""The methods that train a model's own weights: DreamBooth all of them, Custom Diffusion some of cross-attention's.

Float32 copies are trained in place of the weights; the originals stay in memory, to be put back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from diffusekrona.errors import ConfigError
from diffusekrona.tuner.config import KronAConfig
from diffusekrona.tuner.targets import target_layers

from .method import Method, MethodError

_DTYPE_MARK = "base_dtype"


@dataclass
class _Replaced:
    """What `put_back` needs of one component."""

    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)


_replaced: WeakKeyDictionary[nn.Module, _Replaced] = WeakKeyDictionary()


def copy_in_place(component: nn.Module, names: Collection[str]) -> None:
    """Put a trainable float32 copy in place of each named parameter; one that has several names gets one copy.

    Args:
        component: a model. Where its own dtype is narrower, see `float32_inside`.
        names: as `named_parameters(remove_duplicate=False)` gives them.
    """
    replaced = _replaced.setdefault(component, _Replaced())
    copies: dict[nn.Parameter, nn.Parameter] = {}
    found = dict(component.named_parameters(remove_duplicate=False))
    for name in names:
        original = replaced.originals[name] = found[name]
        if original not in copies:
            copies[original] = nn.Parameter(original.detach().to(torch.float32, copy=True))
        _set(component, name, copies[original])


def float32_inside(component: nn.Module, module: nn.Module, dtype: torch.dtype) -> None:
    """Let a module of a component compute in float32, while the modules around it compute in `dtype`."""
    if dtype == torch.float32:
        return

    def widen(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast(args, torch.float32), _cast(kwargs, torch.float32)

    def narrow(_: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, dtype)

    hooks = _replaced.setdefault(component, _Replaced()).hooks
    hooks.append(module.register_forward_pre_hook(widen, with_kwargs=True))
    hooks.append(module.register_forward_hook(narrow))
    if module is component:
        # Pipelines make latents in a component's dtype, which its first parameter decides.
        component.register_parameter(_DTYPE_MARK, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))


def copies_of(component: nn.Module) -> dict[str, nn.Parameter]:
    """The copies in a component by name, each once."""
    names = _replaced[component].originals
    return {name: parameter for name, parameter in component.named_parameters() if name in names}


def put_back(component: nn.Module) -> None:
    """The originals in place of the copies, on the device that these are on."""
    replaced = _replaced.pop(component, _Replaced())
    for hook in replaced.hooks:
        hook.remove()
    if _DTYPE_MARK in component._parameters:
        delattr(component, _DTYPE_MARK)
    for name, original in replaced.originals.items():
        original.data = original.data.to(component.get_parameter(name).device)
        _set(component, name, original)


def _set(component: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(component.get_submodule(parent), child, parameter)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)


class InPlace(Method):
    """Copies of some of a component's weights, trained in their place."""

    def _trained(self, component: nn.Module) -> dict[str, nn.Parameter]:
        return copies_of(component)

    def _take_out(self, component: nn.Module) -> None:
        put_back(component)


@dataclass(frozen=True)
class FullDreamBooth(InPlace):
    """All weights (Ruiz et al., 2023). Trained in float32; the base's own stay in memory, for `remove`."""

    name: ClassVar[str] = "dreambooth"
    label: ClassVar[str] = "DreamBooth"

    def _count(self, component: nn.Module) -> int:
        return sum(parameter.numel() for parameter in component.parameters())

    def _install(self, component: nn.Module) -> None:
        dtype = next(parameter.dtype for parameter in component.parameters() if parameter.is_floating_point())
        copy_in_place(component, [name for name, _ in component.named_parameters(remove_duplicate=False)])
        float32_inside(component, component, dtype)


@dataclass(frozen=True)
class CustomDiffusion(InPlace):
    """K and V of cross-attention, whole (Kumari et al., 2023).

    Left out, so that all methods learn from the same images and prompts: the new word, whose embedding the original
    learns beside these weights (a rare word that there is takes its place), and the real images of the class that it
    retrieves (`fit` takes class images for any method).
    """

    name: ClassVar[str] = "custom-diffusion"
    label: ClassVar[str] = "Custom Diffusion"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_encoders:
            raise MethodError(
                "text_encoders must be False for custom-diffusion: text encoders have no cross-attention."
            )

    def _layers(self, component: nn.Module) -> dict[str, nn.Module]:
        try:
            found = target_layers(component, KronAConfig(target_modules="cross-attention"))
        except ConfigError as error:
            raise MethodError(
                f"custom-diffusion trains K and V of cross-attention, and the {type(component).__name__} has none that "
                "Diffusers marks as such; use a Stable Diffusion 1.x, 2.x or SDXL base, or another method."
            ) from error
        return {name: layer for name, layer in found.items() if name.endswith((".to_k", ".to_v"))}

    def _count(self, component: nn.Module) -> int:
        return sum(p.numel() for layer in self._layers(component).values() for p in layer.parameters())

    def _install(self, component: nn.Module) -> None:
        layers = self._layers(component)
        dtypes = {name: next(layer.parameters()).dtype for name, layer in layers.items()}
        copy_in_place(
            component,
            [f"{layer}.{name}" for layer, module in layers.items() for name, _ in module.named_parameters()],
        )
        for name, layer in layers.items():
            float32_inside(component, layer, dtypes[name])
