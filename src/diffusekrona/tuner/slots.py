"""Slots: adapters of a model whose factors are those of one adapter now, and of another of the same shapes later.

To put an adapter into a model, PEFT looks at every module of it. A slot is put in once; filling it changes no module,
it makes the slot's parameters look at other memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kron.shapes import Layout
from .injected import adapter_tensors, krona_layers
from .names import layer_of, unwrapped_name


@dataclass(frozen=True)
class Structure:
    """Which factors adapters have in common.

    Attributes:
        tensors: component, name as it is saved, and shape of each, sorted.
    """

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]

    @cached_property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """Component and name of each layer."""
        return tuple(dict.fromkeys((part, layer_of(name)) for part, name, _ in self.tensors))

    @cached_property
    def _hash(self) -> int:
        return hash(self.tensors)

    def __hash__(self) -> int:
        return self._hash


class Contents(NamedTuple):
    """What a slot is filled with.

    Attributes:
        tensors: the factors, in the structure's order.
        scales: by component and layer, the scale.
        layouts: by component, the order of the outputs.
    """

    tensors: Sequence[Tensor]
    scales: Mapping[tuple[str, str], float]
    layouts: Mapping[str, Layout]


class Slot:
    """A place in a model for adapters of one structure.

    Args:
        name: of the adapter that was put into the components for it.
        structure: its factors.
        components: the models that it is in.
    """

    def __init__(self, name: str, structure: Structure, components: Mapping[str, nn.Module]) -> None:
        self.name, self.structure = name, structure
        found = {part: adapter_tensors(component, name) for part, component in components.items()}
        self._parameters = [found[part][key] for part, key, _ in structure.tensors]
        self._layers = {
            (part, unwrapped_name(key)): layer
            for part, component in components.items()
            for key, layer in krona_layers(component).items()
            if name in layer.krona_A
        }
        zero = torch.zeros((), device=self._parameters[0].device)
        self._nothing = [zero.expand(shape) for _, _, shape in structure.tensors]
        self.empty()

    def fill(self, contents: Contents) -> None:
        """Be this adapter from now on. Its factors are looked at, not copied."""
        for parameter, tensor in zip(self._parameters, contents.tensors, strict=True):
            parameter.data = tensor
        for (part, name), layer in self._layers.items():
            layer.alpha[self.name] = layer.scaling[self.name] = contents.scales[part, name]
            layer.layout[self.name] = contents.layouts[part]

    def empty(self) -> None:
        """Let go of an adapter's factors. Zeros that take no memory stand for them."""
        for parameter, nothing in zip(self._parameters, self._nothing, strict=True):
            parameter.data = nothing
