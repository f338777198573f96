"""KronALayer: wraps one linear layer or convolution and adds s · Σ (A ⊗ B)x to its output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import FactorShapeError
from ..kron.exact import MERGEABLE_DTYPES, Keep, Restoration, Term, arithmetic_dtype
from ..kron.fused import frozen_with_kron, linear_with_kron
from ..kron.products import dense_update, kron_conv2d, kron_linear, sum_of
from ..kron.shapes import FactorShapes, Layout, UpdateShapes, factor_shapes, stacked, terms_of, update_shapes
from .compat import (
    BaseTunerLayer,
    check_adapters_to_merge,
    execution_device,
    has_listeners,
    is_transformed,
    onloaded,
    padding_of,
)
from .fields import Init
from .merged import MergedWeight, Terms
from .quantized import Original, QuantizedLinear, quantized_linear


class WeightCopy(Protocol):
    """A copy of a layer's weight that is called in its place, such as rows of a fused projection."""

    @property
    def linear(self) -> Any:
        """The layer that has the copy."""

    def check(self, terms: Terms, keep: Keep | None = None) -> None:
        """Raise `MergeError` if the copy cannot hold these terms."""

    def check_undoable(self) -> None:
        """Raise `MergeError` if the copy was cast while merged."""

    def set(self, terms: Terms, keep: Keep | None = None) -> None:
        """Make these terms those that the copy holds."""

    def fold(self, terms: Terms) -> None:
        """`set` for good."""

    def remove(self) -> None:
        """Add updates no more."""


class Batched(Protocol):
    """What a layer does in whose batch each sample has its own adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""

    def update(self, x: Tensor) -> Tensor | None:
        """What of it the adapters add; None for nothing."""


class Factors(nn.ParameterDict):
    """One kind of factor: adapter name → parameter. What offloads weights hooks into its call, as into any module's."""

    def forward(self, name: str) -> Tensor:
        """An alias of a factor; the parameter itself loses its memory when it is offloaded again."""
        factor: Tensor = self[name]
        return factor.view_as(factor)

    __call__ = nn.Module.__call__  # which a ParameterDict has not

    def here(self, name: str) -> Tensor:
        """A factor, brought here if it is offloaded."""
        factor: Tensor = self(name) if "forward" in self.__dict__ else self[name]
        return factor


class KronALayer(nn.Module, BaseTunerLayer):
    """A linear layer with any number of Kronecker adapters: y = base(x) + Σ s · (A ⊗ B)x over the active ones' terms.

    Args:
        base_layer: an `nn.Linear` of d outputs and h inputs, anything that behaves like one, or another adapter's
            layer around one. It stays frozen and is called as it is, so hooks and quantized weights keep working.

    Attributes:
        krona_A: adapter name → A, a1 × a2; all terms' A's, one after the other, where there are several.
        krona_B: adapter name → B, (d/a1) × (h/a2), likewise. A convolution's has a column for each tap of the kernel.
        krona_B1: adapter name → B1, (d/a1) × ρ, where B is a product B1·B2; likewise.
        krona_B2: adapter name → B2, ρ × (h/a2); likewise.
        r: adapter name → the rank its update can reach. Diffusers counts these to name a LoRA loaded on top.
        alpha: adapter name → the scale chosen in its config.
        scaling: adapter name → the scale in force, alpha times the adapter's weight.
        layout: adapter name → the order of its outputs, see `KronAConfig`.
        batched: what to do where each row of the input has its own adapter; None where all have the active ones.
        fused_rows: where this layer's weight has a copy in a fused projection, which is called in its place.

    Raises:
        FactorShapeError: the base layer is not linear.
    """

    adapter_layer_names = ("krona_A", "krona_B", "krona_B1", "krona_B2")
    other_param_names = ("r", "alpha", "scaling", "dropout", "layout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features, self.kernel = layer_size(self.get_base_layer())
        if self.kernel:
            self.groups = 1  # what PEFT's LoRA asks of a convolution that it is put around
        self.krona_A = Factors()
        self.krona_B = Factors()
        self.krona_B1 = Factors()
        self.krona_B2 = Factors()
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._before_zero: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.layout: dict[str, Layout] = {}
        self.merged_adapters: list[str] = []
        self.batched: Batched | None = None
        self._weight = MergedWeight()
        self.fused_rows: WeightCopy | None = None

    def update_layer(
        self,
        adapter_name: str,
        a1: int,
        a2: int,
        *,
        num_terms: int = 1,
        b_rank: int | None = None,
        layout: Layout = "kron",
        alpha: float = 1.0,
        dropout: float = 0.0,
        init_a: Init = "normal",
        init_b: Init = "zeros",
        inference_mode: bool = False,
        factors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter, or start an existing one anew, with A of a1 × a2. Its factors are fp32 on the base's device.

        What the other arguments mean: `KronAConfig`. With `factors`, by "A", "B", "B1" and "B2", it starts with these.

        Raises:
            FactorShapeError: a1 does not divide the outputs, or a2 the inputs.
        """
        shapes = update_shapes(
            factor_shapes(self.out_features, self.in_features, a1, a2), num_terms, b_rank, self.kernel
        )
        for key, parameters in self._parameters_by_factor().items():
            if adapter_name in parameters:
                del parameters[adapter_name]
            if key in shapes.tensors:
                factor = torch.empty(shapes.tensors[key], device=self._device, dtype=torch.float32)
                if factors is None:
                    init_factor_(factor, init_of(key, init_a, init_b), shapes.factors)
                else:
                    factor.copy_(factors[key])
                parameters[adapter_name] = nn.Parameter(factor)
        self.r[adapter_name] = shapes.highest_rank
        self.alpha[adapter_name] = self.scaling[adapter_name] = alpha
        self.dropout[adapter_name] = dropout
        self.layout[adapter_name] = layout
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter. If it is merged, it comes out of the base weight first, as in `unmerge`.

        Raises:
            MergeError: as in `unmerge`.
        """
        self.unmerge([adapter_name])
        self._before_zero.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def shapes(self, adapter_name: str) -> UpdateShapes:
        """The shapes of what one adapter trains here."""
        a1, a2 = self.krona_A[adapter_name].shape[-2:]
        b_rank = self.krona_B1[adapter_name].shape[-1] if adapter_name in self.krona_B1 else None
        factors = FactorShapes(a1, a2, self.out_features // a1, self.in_features // a2)
        return UpdateShapes(factors, self.num_terms(adapter_name), b_rank, self.kernel)

    def num_terms(self, adapter_name: str) -> int:
        """How many products one adapter's update sums."""
        return len(stacked(self.krona_A[adapter_name]))

    def parameters_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """What one adapter trains here: krona_A and krona_B, or krona_A, krona_B1 and krona_B2."""
        factors = {f"krona_{key}": factors for key, factors in self._parameters_by_factor().items()}
        return {name: factor[adapter_name] for name, factor in factors.items() if adapter_name in factor}

    def factors_here(self, adapter_name: str) -> dict[str, Tensor]:
        """What `parameters_of` gives, brought here where it is offloaded."""
        names = self.parameters_of(adapter_name)
        return {name: getattr(self, name).here(adapter_name) for name in names}

    def _parameters_by_factor(self) -> dict[str, Factors]:
        return {"A": self.krona_A, "B": self.krona_B, "B1": self.krona_B1, "B2": self.krona_B2}

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.weight.device
        return execution_device(self.get_base_layer()) if device.type == "meta" else device

    def cast_factors(self, adapter_name: str, to_base: bool = False) -> None:
        """Cast one adapter's factors of half precision to fp32, or any to the base weight's dtype, unless quantized."""
        for parameter in self.parameters_of(adapter_name).values():
            if to_base and self.weight.dtype in MERGEABLE_DTYPES:
                parameter.data = parameter.data.to(self.weight.dtype)
            elif parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own rounds to the base's dtype what was loaded from a file.
        for parameter in self.parameters_of(adapter_name).values():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(self._device if device is None else device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = base(x) + Σ s · (A ⊗ B)x over the active adapters that are not merged.

        Args:
            x: (..., h).
            *args: for the base layer.
            **kwargs: for the base layer.

        Returns:
            (..., d), in the base layer's dtype.
        """
        self.unmerge_if_disabled()
        if self.batched is not None and not self.disable_adapters:
            return self.batched.forward(x, *args, **kwargs)
        base, names = self.base_layer, self._names_to_add()
        if names and not args and not kwargs and self.is_plain(names):
            if can_fuse(base, x):
                return linear_with_kron(x, base.weight, base.bias, self._all_factors(names))
            if (frozen := frozen_to_fuse(base, x)) is not None:
                return frozen_with_kron(x, frozen, self._all_factors(names))
        result: Tensor = base(x, *args, **kwargs)
        for name in names:
            result = result + self.delta(name, x).to(result.dtype)
        return result

    def unmerge_if_disabled(self) -> None:
        """Take merged adapters out of the weight if the adapters are switched off."""
        if self.disable_adapters:
            self.unmerge()

    def update(self, x: Tensor) -> Tensor | None:
        """Σ s · (A ⊗ B)x, (..., d), over the active adapters that are not merged; None without any."""
        if self.batched is not None and not self.disable_adapters:
            return self.batched.update(x)
        names = self._names_to_add()
        return sum_of(self.delta(name, x) for name in names) if names else None

    def _names_to_add(self) -> list[str]:
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.krona_A and name not in self.merged_adapters]

    def is_plain(self, names: list[str]) -> bool:
        """Whether these adapters do no more than add s · (A ⊗ B)x, so that they can be fused with the base."""
        return all(self.layout[name] == "kron" and not self._drops_out(name) for name in names)

    def _drops_out(self, name: str) -> bool:
        return self.training and self.dropout[name] > 0

    def delta(self, name: str, x: Tensor) -> Tensor:
        """The update's part of the output, (..., d)."""
        if self._drops_out(name):
            x = nn.functional.dropout(x, self.dropout[name])
        # Where weights are offloaded in groups, factors that came later stay where they are.
        pairs = [(A.to(x.device, x.dtype), B.to(x.device, x.dtype)) for A, B in self.scaled_factors(name)]
        delta = sum_of(self._product(x, A, B) for A, B in pairs)
        if self.layout[name] == "transposed":
            a1, b1 = self.shapes(name).factors.a1, self.shapes(name).factors.b1
            delta = delta.view(*x.shape[:-1], a1, b1).transpose(-1, -2).flatten(-2)
        return delta

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return kron_linear(x, A, B)

    def _all_factors(self, names: list[str]) -> list[tuple[Tensor, Tensor]]:
        return [pair for name in names for pair in self.scaled_factors(name)]

    def scaled_factors(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """(s·A, B) of each of an adapter's terms."""
        # The scale goes into the smaller factor, which is cheaper than touching x or the output.
        scale = self.scaling[name]
        return [(A if scale == 1 else A * scale, B) for A, B in self.factors(name)]

    def factors(self, adapter_name: str) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of each term, without the scale; a B that is a product multiplied out."""
        return terms_of(self.krona_A.here(adapter_name), self._whole_b(adapter_name))

    def _whole_b(self, name: str) -> Tensor:
        if name in self.krona_B:
            return self.krona_B.here(name)
        return torch.matmul(self.krona_B1.here(name), self.krona_B2.here(name))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update of one adapter, of the base weight's shape, in the factors' dtype."""
        delta = dense_update(self.scaled_factors(adapter), self.layout[adapter])
        return delta.view(self.out_features, self.in_features, *self.kernel)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True for a linear layer: the update is additive, and `peft.convert_to_lora` approximates matrices only."""
        return not self.kernel

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make `scale` times alpha the scale of one adapter, if this layer has it."""
        if adapter in self.alpha:
            # After a call with the scale 0, Diffusers resets to 1 what it cannot divide by 0 again.
            kept = self._before_zero.pop(adapter, None)
            self.scaling[adapter] = kept if kept is not None and scale == 1 else scale * self.alpha[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter. Back from 0 lead `unscale_layer` and `set_scale(name, 1)`."""
        for name in self.active_adapters:
            if name in self.scaling:
                if scale == 0:
                    self._before_zero.setdefault(name, self.scaling[name])
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without an argument go back to alpha."""
        for name in self.active_adapters:
            if name in self.scaling:
                kept = self._before_zero.pop(name, self.scaling[name])
                self.scaling[name] = self.alpha[name] if scale is None else kept if scale == 0 else kept / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the updates of the named adapters, or of the active ones, into the base weight, in place.

        The arithmetic is fp32 whatever the weight's dtype, the sum over all merged adapters is rounded once, and
        `unmerge` gives back the old weight bit for bit, also after the factors have changed. What others do to the
        weight in between is theirs to undo first: a cast, another tuner's merge, a second layer on the same weight.
        A quantized weight is quantized anew, and the old one kept.

        Args:
            safe_merge: no effect: every merge is checked before it changes anything.
            adapter_names: which adapters; those already merged stay so.

        Raises:
            MergeError: the result would not be finite, or the base weight is quantized in a format that cannot be
                written back. Nothing has changed then.
        """
        terms = self.merge_terms(check_adapters_to_merge(self, adapter_names))
        if terms.keys() != self.merged_terms.keys():
            self.check_mergeable(terms, "entries")
            self.set_merged(terms, "entries")

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take the named merged adapters, or all, out of the base weight. Without any left it is what it was, bitwise.

        To rounding, and with a warning, where `merge_krona(…, exact=False)` merged them.

        Raises:
            MergeError: the weight was cast to another dtype while merged.
            TypeError: `adapter_names` is a single name.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = self.merged_adapters if adapter_names is None else adapter_names
        self.set_merged({name: term for name, term in self.merged_terms.items() if name not in names})

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters in its weight for good if asked. PEFT's `merge_and_unload` calls this.

        Nothing is kept to unmerge, which makes this several times faster than `merge`; the bits are the same. Other
        methods' adapters that lie between this layer and its base are merged, too, where PEFT would drop them.

        Raises:
            MergeError: as in `merge`.
        """
        if merge:
            terms = self.merge_terms(check_adapters_to_merge(self, adapter_names))
            self.check_mergeable(terms)
            self.fold(terms)
            for layer in layers_beneath(self):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    @torch.no_grad()
    def merge_terms(self, adapter_names: list[str]) -> dict[str, list[Term]]:
        """What would be merged if these adapters were merged now: the terms merged already, then the new ones."""
        names = [n for n in adapter_names if n in self.krona_A and n not in self.merged_adapters]
        dtype = arithmetic_dtype(self.weight.dtype)
        return {**self.merged_terms, **{name: self._terms(name, dtype) for name in names}}

    def _terms(self, name: str, dtype: torch.dtype) -> list[Term]:
        # The terms must outlive changes of the parameters, which .to() would return where the dtype fits.
        return [
            Term(A.to(dtype) * self.scaling[name], B.to(dtype, copy=True), self.layout[name])
            for A, B in self.factors(name)
        ]

    def check_mergeable(self, terms: dict[str, list[Term]], keep: Keep | None = None) -> None:
        """Raise `MergeError` if these terms cannot be folded into the base weight; changes nothing.

        Args:
            terms: all that the weight would hold.
            keep: what would be kept to unmerge them, which must be exact if what is kept already is, and the other way
                round; None for either.
        """
        with onloaded(self):
            self._weight.check(self.get_base_layer(), terms, keep)
        if self.fused_rows is not None:
            self.fused_rows.check(terms, keep)

    def check_unmergeable(self) -> None:
        """Raise `MergeError` if the weight was cast to another dtype while merged."""
        self._weight.check_undoable(self.get_base_layer())
        if self.fused_rows is not None:
            self.fused_rows.check_undoable()

    def set_merged(self, terms: dict[str, list[Term]], keep: Keep | None = None) -> None:
        """Make exactly these terms, which `check_mergeable` has passed, the ones that the base weight holds.

        Args:
            terms: all that the weight is to hold.
            keep: what to keep to unmerge them; None for what is kept already, or else what makes it exact.
        """
        with onloaded(self):
            self._weight.set(self.get_base_layer(), terms, keep)
        if self.fused_rows is not None:
            self.fused_rows.set(terms, keep)
        self.merged_adapters = list(terms)

    def fold(self, terms: dict[str, list[Term]]) -> None:
        """`set_merged` for good, for a layer that will be unloaded: nothing is kept to unmerge."""
        with onloaded(self):
            self._weight.fold(self.get_base_layer(), terms)
        if self.fused_rows is not None:
            self.fused_rows.fold(terms)
        self.merged_adapters = list(terms)

    def merged_copy(self) -> MergedWeight:
        """What is merged here, for a copy of the weight as it is now."""
        return self._weight.copy()

    @property
    def merged_terms(self) -> dict[str, list[Term]]:
        """Adapter name → what the base weight holds of it; empty while nothing is merged."""
        return self._weight.terms

    @property
    def restoration(self) -> Restoration | Original | None:
        """What is kept to unmerge; None while nothing is merged."""
        return self._weight.restoration

    @property
    def kept(self) -> Keep | None:
        """Which of the ways to keep it that is; None also where the weight is quantized."""
        return self._weight.keep


class KronALinear(KronALayer):
    """A `KronALayer` under a name by which PEFT's "all-linear" knows a linear layer that has adapters already."""


def can_fuse(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether `linear_with_kron` may stand in for calling this base layer on x.

    Only for a plain `nn.Linear` that is not being trained and that nobody listens to: hooks, replaced forward methods,
    quantized weights and other tensor subclasses need the layer's own call. Neither vmap and the other transforms of
    torch.func nor forward-mode differentiation can look into the fused step.
    """
    return (
        type(layer) is nn.Linear
        and type(x) in (Tensor, nn.Parameter)
        and type(layer.weight) is nn.Parameter
        and not (torch.is_grad_enabled() and _is_trained(layer))
        and not has_listeners(layer)
        and not is_transformed()
    )


def frozen_to_fuse(layer: nn.Module, x: Tensor) -> QuantizedLinear | None:
    """A quantized layer for `frozen_with_kron`, under the conditions of `can_fuse`; None where it does not apply."""
    if (
        not isinstance(layer, nn.Linear)  # also other methods' layers, which have the weight of the one beneath
        or isinstance(layer, BaseTunerLayer)
        or type(x) not in (Tensor, nn.Parameter)
        or not torch.is_grad_enabled()
        or has_listeners(layer)
        or is_transformed()
        or torch.compiler.is_compiling()
    ):
        return None
    return quantized_linear(layer)


def _is_trained(layer: nn.Linear) -> bool:
    return layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)


def krona_layer_in(module: nn.Module | None) -> KronALayer | None:
    """The KronALayer that a module is, or has under other methods' layers; None without one."""
    layer: Any = module
    while layer is not None and not isinstance(layer, KronALayer):
        layer = getattr(layer, "base_layer", None)
    return layer


def layers_beneath(layer: BaseTunerLayer) -> Iterator[BaseTunerLayer]:
    """The layers of other adapters between an adapter's layer and its base."""
    beneath = getattr(layer, "base_layer", None)
    while isinstance(beneath, BaseTunerLayer):
        yield beneath
        beneath = getattr(beneath, "base_layer", None)


def layer_size(layer: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """(outputs, inputs, kernel) of a linear layer, whose kernel is (), or of a convolution.

    Raises:
        FactorShapeError: the layer is neither, or a convolution in groups.
    """
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise FactorShapeError(
                f"it is a convolution in {layer.groups} groups, and KronA needs one that has just one"
            )
        return layer.out_channels, layer.in_channels, tuple(layer.kernel_size)
    size = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if isinstance(size[0], int) and isinstance(size[1], int) and hasattr(layer, "weight"):
        return size[0], size[1], ()
    raise FactorShapeError(f"it is a {type(layer).__name__}, and KronA adapts linear layers and Conv2d only")


def init_of(factor: str, init_a: Init, init_b: Init) -> Init:
    """How a factor starts. Of a product B1·B2, B1 is random, so that B2 learns from the first step."""
    if factor == "B1":
        return "kaiming_uniform"
    return init_a if factor == "A" else init_b


@torch.no_grad()
def init_factor_(factor: Tensor, init: Init, shapes: FactorShapes) -> None:
    """Fill a factor of a layer of these shapes in place, as `KronAConfig` describes each name (Appendix D.2).

    Args:
        factor: its last two dimensions are rows and columns.
        init: the name.
        shapes: of A and B.
    """
    if init == "zeros":
        factor.zero_()
    elif init == "normal":
        factor.normal_(std=1 / shapes.a2)
    elif init == "normal_sqrt":
        factor.normal_(std=math.sqrt(min(shapes.d, shapes.h)))
    else:
        rows, columns = factor.shape[-2:]
        bound = math.sqrt(6 / (columns if init == "kaiming_uniform" else rows + columns))
        factor.uniform_(-bound, bound)


class KronAConv2d(KronALayer):
    """A convolution with any number of Kronecker adapters: y = base(x) + Σ s · conv2d(x, A ⊗ B).

    A is a1 × a2 and B is b1 × (b2·kernel height·kernel width), with a1·b1 output and a2·b2 input channels.

    Args:
        base_layer: an `nn.Conv2d` in one group, of any kernel, stride, padding and dilation.

    Raises:
        FactorShapeError: the convolution has several groups.
    """

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        B = B.view(B.shape[0], -1, *self.kernel)
        if base.padding_mode == "zeros":
            return kron_conv2d(x, A, B, base.stride, base.padding, base.dilation)
        padded = functional.pad(x, padding_of(base), mode=base.padding_mode)
        return kron_conv2d(padded, A, B, base.stride, 0, base.dilation)
