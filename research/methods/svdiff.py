"""SVDiff: the singular values of every weight are shifted, the singular vectors stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .method import Method, MethodError
from .spectral import Shiftable, SpectralLayer, as_matrix


@dataclass(frozen=True)
class SVDiff(Method):
    """Spectral shifts δ of all linear layers, convolutions, norms and embeddings (Han et al., 2023); biases stay.

    A norm's weights are a matrix of one row, with one singular value. That and which layers take part are as in the
    public implementation, since the authors published none; there norms get a lower learning rate of their
    own, here all get the same. The singular vectors are computed anew for each pipeline: a file fits only its base.
    """

    name: ClassVar[str] = "svdiff"
    label: ClassVar[str] = "SVDiff"

    def _count(self, component: nn.Module) -> int:
        return sum(min(as_matrix(layer.weight).shape) for layer in _layers(component).values())

    def _install(self, component: nn.Module) -> None:
        layers = _layers(component)
        if not layers:
            raise MethodError(f"The {type(component).__name__} has no layer whose singular values could be shifted.")
        wrapped: dict[nn.Module, SpectralLayer] = {}
        for name, layer in layers.items():
            if not layer.weight.is_meta and not bool(layer.weight.isfinite().all()):
                raise MethodError(f"{name} holds an infinity or a NaN, so it has no singular values.")
            wrapped[layer] = SpectralLayer(layer)
        for name, layer in list(component.named_modules(remove_duplicate=False)):
            if layer in wrapped:
                parent, _, child = name.rpartition(".")
                setattr(component.get_submodule(parent), child, wrapped[layer])

    def _trained(self, component: nn.Module) -> dict[str, nn.Parameter]:
        layers = component.named_modules()
        return {f"{name}.delta": layer.delta for name, layer in layers if isinstance(layer, SpectralLayer)}

    def _take_out(self, component: nn.Module) -> None:
        for name, layer in list(component.named_modules(remove_duplicate=False)):
            if isinstance(layer, SpectralLayer):
                parent, _, child = name.rpartition(".")
                setattr(component.get_submodule(parent), child, layer.base_layer)


def _layers(component: nn.Module) -> dict[str, Any]:
    """The layers that take part, each once."""
    return {
        name: module
        for name, module in component.named_modules()
        if name and isinstance(module, Shiftable) and isinstance(getattr(module, "weight", None), nn.Parameter)
    }
