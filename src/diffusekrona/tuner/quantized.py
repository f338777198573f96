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
