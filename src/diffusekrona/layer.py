"""KronALayer: wraps one linear layer and adds s · (A ⊗ B)x to its output."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .config import Init
from .errors import FactorShapeError, MergeError
from .exact import MERGEABLE_DTYPES, Restoration, Term, arithmetic_dtype, check_mergeable, fold_, merge_, unmerge_
from .factors import FactorShapes, factor_shapes
from .fused import can_fuse, linear_with_kron
from .ops import kron_linear


class KronALayer(nn.Module, BaseTunerLayer):
    """A linear layer with any number of Kronecker adapters: y = base(x) + Σ s · (A ⊗ B)x over the active ones.

    Args:
        base_layer: an `nn.Linear` of d outputs and h inputs, anything that behaves like one, or another adapter's
            layer around one. It stays frozen and is called as it is, so hooks and quantized weights keep working.

    Attributes:
        krona_A: adapter name → A, a1 × a2.
        krona_B: adapter name → B, (d/a1) × (h/a2).
        alpha: adapter name → the scale chosen in its config.
        scaling: adapter name → the scale in force, alpha times the adapter's weight.

    Raises:
        FactorShapeError: the base layer is not linear.
    """

    adapter_layer_names = ("krona_A", "krona_B")
    other_param_names = ("alpha", "scaling", "dropout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = linear_size(self.get_base_layer())
        self.krona_A = nn.ParameterDict()
        self.krona_B = nn.ParameterDict()
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._merged_terms: dict[str, Term] = {}
        self._restoration: Restoration | None = None

    def update_layer(
        self,
        adapter_name: str,
        a1: int,
        a2: int,
        *,
        alpha: float = 1.0,
        dropout: float = 0.0,
        init_a: Init = "normal",
        init_b: Init = "zeros",
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, or start an existing one anew, with A of a1 × a2. Its factors are fp32 on the base's device.

        Raises:
            FactorShapeError: a1 does not divide the outputs, or a2 the inputs.
        """
        shapes = factor_shapes(self.out_features, self.in_features, a1, a2)
        device = self.weight.device
        for factors, size in ((self.krona_A, (shapes.a1, shapes.a2)), (self.krona_B, (shapes.b1, shapes.b2))):
            factors[adapter_name] = nn.Parameter(torch.empty(size, device=device, dtype=torch.float32))
        self.alpha[adapter_name] = self.scaling[adapter_name] = alpha
        self.dropout[adapter_name] = dropout
        init_factor_(self.krona_A[adapter_name], init_a, shapes)
        init_factor_(self.krona_B[adapter_name], init_b, shapes)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter. If it is merged, it comes out of the base weight first, as in `unmerge`.

        Raises:
            MergeError: as in `unmerge`.
        """
        self.unmerge([adapter_name])
        super().delete_adapter(adapter_name)

    @property
    def r(self) -> dict[str, int]:
        """Adapter name → the rank its update can reach. Diffusers counts these to name a LoRA loaded on top."""
        shapes = {name: self.factor_shapes(name) for name in self.krona_A}
        return {name: min(s.a1, s.a2) * min(s.b1, s.b2) for name, s in shapes.items()}

    def factor_shapes(self, adapter_name: str) -> FactorShapes:
        """The shapes of one adapter's A and B."""
        return FactorShapes(*self.krona_A[adapter_name].shape, *self.krona_B[adapter_name].shape)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = base(x) + Σ s · (A ⊗ B)x over the active adapters that are not merged.

        Args:
            x: (..., h).
            *args: for the base layer.
            **kwargs: for the base layer.

        Returns:
            (..., d), in the base layer's dtype.
        """
        if self.disable_adapters:
            self.unmerge()
        base, names = self.base_layer, self._names_to_add()
        if names and not args and not kwargs and not self._drops_out(names) and can_fuse(base, x):
            return linear_with_kron(x, base.weight, base.bias, [self._scaled_factors(name) for name in names])
        result: Tensor = base(x, *args, **kwargs)
        for name in names:
            result = result + self._delta(name, x).to(result.dtype)
        return result

    def _names_to_add(self) -> list[str]:
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.krona_A and name not in self.merged_adapters]

    def _drops_out(self, names: list[str]) -> bool:
        return self.training and any(self.dropout[name] for name in names)

    def _delta(self, name: str, x: Tensor) -> Tensor:
        if self._drops_out([name]):
            x = nn.functional.dropout(x, self.dropout[name])
        A, B = self._scaled_factors(name)
        return kron_linear(x, A.to(x.dtype), B.to(x.dtype))

    def _scaled_factors(self, name: str) -> tuple[Tensor, Tensor]:
        # The scale goes into the smaller factor, which is cheaper than touching x or the output.
        A, scale = self.krona_A[name], self.scaling[name]
        return A if scale == 1 else A * scale, self.krona_B[name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update s · A ⊗ B of one adapter, d × h, in the factors' dtype."""
        # torch.kron refuses some factors that are not contiguous.
        A, B = self.krona_A[adapter].contiguous(), self.krona_B[adapter].contiguous()
        return torch.kron(A * self.scaling[adapter], B)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is additive, so `peft.convert_to_lora` can approximate it."""
        return True

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make `scale` times alpha the scale of one adapter, if this layer has it."""
        if adapter in self.alpha:
            self.scaling[adapter] = scale * self.alpha[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without an argument go back to alpha."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.alpha[name] if scale is None else self.scaling[name] / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold s · A ⊗ B of the named adapters, or of the active ones, into the base weight, in place.

        The arithmetic is fp32 whatever the weight's dtype, the sum over all merged adapters is rounded once, and
        `unmerge` gives back the old weight bit for bit, also after the factors have changed. What others do to the
        weight in between is theirs to undo first: a cast, another tuner's merge, a second layer on the same weight.

        Args:
            safe_merge: no effect: every merge is checked before it changes anything.
            adapter_names: which adapters; those already merged stay so.

        Raises:
            MergeError: the result would not be finite, or the base weight is quantized. Nothing has changed then.
        """
        terms = self.merge_terms(check_adapters_to_merge(self, adapter_names))
        self.check_mergeable(terms)
        self.set_merged(terms)

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take the named merged adapters, or all, out of the base weight. Without any left it is what it was, bitwise.

        Raises:
            MergeError: the weight was cast to another dtype while merged.
            TypeError: `adapter_names` is a single name.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = self.merged_adapters if adapter_names is None else adapter_names
        self.set_merged({name: term for name, term in self._merged_terms.items() if name not in names})

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters in its weight for good if asked. PEFT's `merge_and_unload` calls this.

        Nothing is kept to unmerge, which makes this several times faster than `merge`; the bits are the same.

        Raises:
            MergeError: as in `merge`.
        """
        if merge:
            terms = self.merge_terms(check_adapters_to_merge(self, adapter_names))
            self.check_mergeable(terms)
            if terms.keys() != self._merged_terms.keys():
                self.set_merged({})
                fold_(self.weight, list(terms.values()))
        return self.get_base_layer()

    def merge_terms(self, adapter_names: list[str]) -> dict[str, Term]:
        """What would be merged if these adapters were merged now: the terms merged already, then the new ones."""
        names = [n for n in adapter_names if n in self.krona_A and n not in self.merged_adapters]
        dtype = arithmetic_dtype(self.weight.dtype)
        with torch.no_grad():
            # .to() would return the parameter itself where the dtype fits, and the terms must outlive its changes.
            new = {
                name: (
                    self.krona_A[name].to(dtype) * self.scaling[name],
                    self.krona_B[name].to(dtype, copy=True),
                )
                for name in names
            }
        return {**self._merged_terms, **new}

    @torch.no_grad()
    def check_mergeable(self, terms: dict[str, Term]) -> None:
        """Raise `MergeError` if these terms cannot be folded into the base weight; changes nothing."""
        if terms.keys() == self._merged_terms.keys():
            return
        weight = self.weight
        if weight.dtype not in MERGEABLE_DTYPES or weight.shape != (self.out_features, self.in_features):
            raise MergeError(
                f"the base layer, a {type(self.get_base_layer()).__name__}, keeps its weight as {weight.dtype} of "
                f"shape {tuple(weight.shape)}; only plain weights of 16, 32 or 64 bits can be merged into, so load the "
                "base unquantized"
            )
        before = self._merged_terms
        self.set_merged({})
        try:
            check_mergeable(weight, list(terms.values()))
        finally:
            self.set_merged(before)

    def check_unmergeable(self) -> None:
        """Raise `MergeError` if the weight was cast to another dtype while merged."""
        dtype = self.weight.dtype
        if self._restoration is not None and dtype != self._restoration.dtype:
            raise MergeError(
                f"the base weight was merged in {self._restoration.dtype} and is now {dtype}, so its original bits are "
                "lost; cast only unmerged models"
            )

    @torch.no_grad()
    def set_merged(self, terms: dict[str, Term]) -> None:
        """Make exactly these terms, which `check_mergeable` has passed, the ones that the base weight holds."""
        if terms.keys() == self._merged_terms.keys():
            return
        self.check_unmergeable()
        weight = self.weight
        if self._restoration is not None:
            unmerge_(weight, list(self._merged_terms.values()), self._restoration)
        self._restoration = merge_(weight, list(terms.values())) if terms else None
        self._merged_terms = terms
        self.merged_adapters = list(terms)

    @property
    def merged_terms(self) -> dict[str, Term]:
        """Adapter name → what the base weight holds of it; empty while nothing is merged."""
        return self._merged_terms

    @property
    def restoration(self) -> Restoration | None:
        """What is kept to unmerge exactly; None while nothing is merged."""
        return self._restoration


def linear_size(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer.

    Raises:
        FactorShapeError: the layer does not behave like `nn.Linear`.
    """
    size = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if isinstance(size[0], int) and isinstance(size[1], int) and hasattr(layer, "weight"):
        return size[0], size[1]
    raise FactorShapeError(f"it is a {type(layer).__name__}, and KronA adapts linear layers only")


@torch.no_grad()
def init_factor_(factor: Tensor, init: Init, shapes: FactorShapes) -> None:
    """Fill a factor of a layer of these shapes in place, as `KronAConfig` describes each name (Appendix D.2)."""
    rows, columns = factor.shape
    if init == "zeros":
        factor.zero_()
    elif init == "normal":
        factor.normal_(std=1 / shapes.a2)
    elif init == "normal_sqrt":
        factor.normal_(std=math.sqrt(min(shapes.d, shapes.h)))
    else:
        bound = math.sqrt(6 / (columns if init == "kaiming_uniform" else rows + columns))
        factor.uniform_(-bound, bound)
