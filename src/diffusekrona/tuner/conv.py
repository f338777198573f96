"""KronAConv2d: a convolution with Kronecker adapters, whose B carries the kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from ..kron.products import kron_conv2d
from .layer import KronALayer


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
        padded = functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        return kron_conv2d(padded, A, B, base.stride, 0, base.dilation)
