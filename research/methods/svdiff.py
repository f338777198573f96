"""SVDiff: the singular values of every weight are shifted, the singular vectors stay.

Of one layer W' = U · diag(relu(σ + δ)) · Vᵀ, where W = U · diag(σ) · Vᵀ is frozen and δ is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F

from diffusekrona.kron.exact import arithmetic_dtype

from .method import Method, MethodError

Shiftable = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
"""Layers whose weight can be shifted."""

_MATRIX_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as the matrix whose singular values are shifted.

    A convolution is outputs × (inputs · kernel), and a norm's n weights are 1 × n, which has one singular value.
    """
    return weight.flatten(1) if weight.dim() > 1 else weight.unsqueeze(0)


class SpectralLayer(nn.Module):
    """Wraps a layer, whose weight it leaves alone, and computes with the shifted weight instead.

    It computes W + U · diag(relu(σ + δ) − σ) · Vᵀ, which is the same and for δ = 0 is W, bit for bit. The update is
    computed in float32, or wider if the base is. U and V take as much memory as the float32 weight, or twice that.

    Attributes:
        base_layer: the layer.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        weight: Any = base_layer.weight
        matrix = as_matrix(weight.detach()).to(arithmetic_dtype(weight.dtype))
        for name, part in zip(("U", "S", "Vh"), torch.linalg.svd(matrix, full_matrices=False), strict=True):
            self.register_buffer(name, part.contiguous(), persistent=False)
        # A model has its first parameter's dtype. That parameter has to be the layer's, so δ is one module deeper.
        self.trained = nn.ParameterDict({"delta": torch.zeros_like(self.S)})

    @property
    def delta(self) -> nn.Parameter:
        """δ, one number for each singular value, in descending order of these."""
        delta: nn.Parameter = self.trained["delta"]
        return delta

    def __getattr__(self, name: str) -> Any:
        """All other attributes are the layer's. Models ask for sizes, and for the dtype and device of `weight`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output for x with the shifted weight."""
        if isinstance(self.base_layer, nn.Embedding):
            return self._embed(x)
        weight = self._computed_in(x, self.shifted_weight())
        if not torch.is_grad_enabled():
            return functional_call(self.base_layer, {"weight": weight}, (x, *args), kwargs)
        storage = weight.untyped_storage().data_ptr()

        # The product keeps its weight for the gradient of x, which over a whole model is a second copy of it. The
        # backward pass computes it again instead.
        def pack(tensor: Tensor) -> Any:
            if tensor.untyped_storage().data_ptr() == storage:
                return tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype
            return tensor

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            *place, dtype = packed
            with torch.no_grad():
                return self.shifted_weight().to(dtype).as_strided(*place)

        with saved_tensors_hooks(pack, unpack):
            return functional_call(self.base_layer, {"weight": weight}, (x, *args), kwargs)

    def shifted_weight(self) -> Tensor:
        """W', in the weight's shape and dtype, contiguous."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        update = (self.U * self._shift()) @ self.Vh
        return (weight + update.view(weight.shape)).to(weight.dtype).contiguous()

    def _shift(self) -> Tensor:
        return F.relu(self.S + self.delta) - self.S

    def _computed_in(self, x: Tensor, weight: Tensor) -> Tensor:
        """The weight in the dtype that autocast would turn it into, so that it is still ours when it is kept."""
        device = x.device.type
        if isinstance(self.base_layer, _MATRIX_PRODUCTS) and torch.is_autocast_enabled(device):
            return weight.to(torch.get_autocast_dtype(device))
        return weight

    def _embed(self, x: Tensor) -> Tensor:
        # Just the rows that are asked for: a vocabulary's whole weight is large.
        rows: Tensor = self.base_layer(x)
        update = (F.embedding(x, self.U) * self._shift()) @ self.Vh
        return (rows + update).to(rows.dtype)


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
