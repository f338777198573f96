"""Quantized base weights that can be merged into: read as numbers, written back in their own format.

bitsandbytes' 8- and 4-bit, torchao's `Int8Tensor` and quanto's frozen weights. None of these libraries is imported
here: a weight of theirs brings it along. What is not known here is refused by `check_format`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..kron.exact import MERGEABLE_DTYPES
from .compat import dequantize_bnb_weight

_BNB_STATE = ("CB", "SCB")


class Original(NamedTuple):
    """A quantized weight as it was before a merge, to be put back.

    Attributes:
        weight: the parameter itself.
        state: what bitsandbytes' 8-bit layers keep outside of it.
    """

    weight: nn.Parameter
    state: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The weight's, as `Restoration` has it."""
        return self.weight.dtype


def is_quantized(base: nn.Module) -> bool:
    """Whether a base layer's weight is anything but plain numbers of 16, 32 or 64 bits."""
    weight = base.weight
    assert isinstance(weight, Tensor)
    return type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in MERGEABLE_DTYPES


def check_format(base: nn.Module) -> None:
    """Raise `MergeError` if a quantized weight cannot be written back in its format."""
    if _format(base) is None:
        weight: Any = base.weight
        raise MergeError(
            f"the base layer, a {type(base).__name__}, keeps its weight as a {type(weight).__name__} of {weight.dtype} "
            f"and shape {tuple(weight.shape)}, which cannot be written back after a merge; load the base unquantized"
        )


def dequantized(base: nn.Module, original: Original | None = None) -> Tensor:
    """The numbers that a quantized weight stands for, d × h, in a new tensor in fp32.

    Args:
        base: the layer.
        original: its weight from before a merge, where that is asked for.
    """
    weight: Any = base.weight if original is None else original.weight
    state = getattr(base, "state", None) if original is None else SimpleNamespace(**original.state)
    # PEFT's `dequantize_module_weight` would put a new parameter into the layer.
    from_bnb = str(_format(base)).startswith("bnb")
    numbers = dequantize_bnb_weight(weight, state) if from_bnb else weight.dequantize()
    return numbers.detach().to(torch.float32, copy=True)


def carrier(base: nn.Module) -> torch.dtype:
    """The dtype in which a format takes the numbers that it quantizes."""
    weight: Any = base.weight
    kind = _format(base)
    dtype: torch.dtype = weight.quant_state.dtype if kind == "bnb 4-bit" else weight.dtype
    return torch.float16 if kind == "bnb 8-bit" else dtype


def replace(base: Any, numbers: Tensor) -> Original:
    """Make numbers, d × h, the base's weight in the format that it has, and return the old one."""
    old, kind = base.weight, _format(base)
    state: Any = getattr(base, "state", None)
    numbers = numbers.to(carrier(base))
    original = Original(old, {name: getattr(state, name, None) for name in _BNB_STATE} if kind == "bnb 8-bit" else {})
    if kind == "bnb 4-bit":
        settings = {
            name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        }
        base.weight = type(old)(numbers.cpu(), requires_grad=False, module=base, **settings).to(old.device)
    elif kind == "bnb 8-bit":
        state.CB = state.SCB = None
        base.weight = type(old)(numbers.cpu(), requires_grad=False, has_fp16_weights=False).to(old.device)
    elif kind == "torchao":
        base.weight = nn.Parameter(_in_torchao(old, numbers), requires_grad=False)
    else:
        base.weight = nn.Parameter(numbers, requires_grad=False)
        base.freeze()
        base.weight.requires_grad_(False)
    return original


def put_back(base: Any, original: Original) -> None:
    """Undo `replace`: the very parameter that was there before."""
    base.weight = original.weight
    for name, value in original.state.items():
        setattr(base.state, name, value)


class QuantizedLinear:
    """A quantized linear layer as `frozen_with_kron` takes it.

    torchao's own way of reading a weight takes several times what its numbers need, on a CPU that has no conversion
    from 8-bit floats most of all. What is read here is the same to the last bit.

    Args:
        base: the layer, whose weight and bias are frozen.
        kind: of its weight, one of `READ_FAST`.
    """

    def __init__(self, base: nn.Module, kind: str) -> None:
        self._base, self._kind = base, kind

    def __call__(self, x: Tensor) -> Tensor:
        """Wx + bias as the layer itself computes it."""
        base: Any = self._base
        if self._kind == "torchao float8" and x.dtype == base.weight.dtype:
            y: Tensor = x @ self.weight(x.dtype).T
            return y if base.bias is None else y + base.bias
        computed: Tensor = base(x)
        return computed

    def input_gradient(self, gy: Tensor) -> Tensor:
        """gy W, (..., h), in gy's dtype."""
        weight: Any = self._base.weight
        if self._kind == "torchao":  # scales of rows go into gy, as in torchao
            whole: Tensor = weight.qdata.to(gy.dtype)
            scale: Tensor = weight.scale.flatten().to(gy.dtype)
            return (gy * scale) @ whole
        return gy @ self.weight(gy.dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The numbers that the weight stands for, d × h, in a new tensor."""
        weight: Any = self._base.weight
        if self._kind == "bnb 4-bit":
            numbers: Tensor = dequantize_bnb_weight(weight, None)
            return numbers.to(dtype)
        found = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        scales = weight.scale.reshape(-1, 1).expand(len(found), 1)
        for some, codes, scale in zip(
            found.split(_ROWS), weight.qdata.split(_ROWS), scales.split(_ROWS), strict=True
        ):  # what is wider in between stays in the processor's caches
            some.copy_(_widened(codes).mul_(scale))
        return found.to(dtype)


READ_FAST = ("bnb 4-bit", "torchao", "torchao float8")
"""Kinds of weights that `QuantizedLinear` reads."""


def quantized_linear(base: nn.Module) -> QuantizedLinear | None:
    """A frozen layer for the fused step, or None where the layer has to compute by itself."""
    kind = _float8(base) or _format(base)
    if kind not in READ_FAST or getattr(base.weight, "act_quant_kwargs", None) is not None:
        return None
    bias = getattr(base, "bias", None)
    return None if bias is not None and bias.requires_grad else QuantizedLinear(base, kind)


def _float8(base: nn.Module) -> str | None:
    """The kind of a weight of torchao's 8-bit floats with a scale for each row, or for all; None for others."""
    weight: Any = base.weight
    module, name = type(weight).__module__, type(weight).__name__
    if not module.startswith("torchao.") or name != "Float8Tensor":
        return None
    return "torchao float8" if weight.scale.numel() in (1, len(weight)) else None


_ROWS = 256


def _widened(tensor: Tensor) -> Tensor:
    """8-bit numbers in fp32; floats on a CPU out of a table of all 256."""
    if not tensor.is_cpu or not tensor.is_floating_point():
        return tensor.float()
    table = torch.arange(256, dtype=torch.uint8).view(tensor.dtype).float()
    # Not by table[…], which takes seven times as long.
    return table.index_select(0, tensor.view(torch.uint8).flatten().int()).view(tensor.shape)


def _format(base: nn.Module) -> str | None:
    weight: Any = base.weight
    module, name = type(weight).__module__, type(weight).__name__
    if module.startswith("bitsandbytes."):
        known = {"Params4bit": "bnb 4-bit", "Int8Params": "bnb 8-bit"}.get(name)
        return known if not getattr(weight, "has_fp16_weights", False) else None
    if module.startswith("torchao.") and name == "Int8Tensor" and _granularity(weight) is not None:
        return "torchao"
    return "quanto" if module.startswith("optimum.quanto.") and hasattr(base, "freeze") else None


def _granularity(weight: Any) -> str | None:
    """Of the scales of torchao's tensor: one for each row, or just one."""
    block, size = tuple(weight.block_size), tuple(weight.shape)
    # torchao 0.16 has symmetric weights only, and no name for their zero.
    zero = getattr(weight, "zero_point", None)
    if zero is not None and bool(zero.any()):
        return None
    return "PerRow" if block == (1, size[1]) else "PerTensor" if block == size else None


def _in_torchao(old: Any, numbers: Tensor) -> Any:
    from torchao.quantization import granularity

    # torchao before 0.18 has no reduce_range.
    settings = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale", "reduce_range")
    kept = {name: getattr(old, name) for name in settings if hasattr(old, name)}
    return type(old).from_hp(numbers, getattr(granularity, str(_granularity(old)))(), **kept)
