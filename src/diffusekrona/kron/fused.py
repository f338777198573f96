"""A frozen linear layer and its Kronecker adapters as one step of the autograd graph.

`functional.linear(x, W, bias) + Σ s · kron_linear(x, A, B)` is the reference that this is tested against. Doing it in
one step saves passes over memory: the adapters' parts are added in place to the base's output and to the base's
input gradient, and what is kept for the backward pass is x alone, which the caller holds anyway. The small
intermediates are computed anew there. On a CPU, where the tokens are many for the layer's size, even adding in place
costs more than building W + Σ A ⊗ B for the moment of one product; so there it is built, and never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .costs import cheapest_order, merging_pays
from .shapes import FactorShapes


def linear_with_kron(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """y = Wx + bias + Σ (A ⊗ B)x, each product in the cheaper order.

    Args:
        x: inputs, (..., h).
        weight: W, d × h, frozen, of x's dtype (under autocast, of any floating dtype).
        bias: d or None, frozen.
        factors: (A, B) of each adapter, of any floating dtype. A scale belongs into A.

    Returns:
        (..., d), in x's dtype (under autocast, in autocast's).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # Cast here and not in the step, whose backward pass would have to do so again.
    flat = [factor.to(x.dtype) for pair in factors for factor in pair]
    # torch.compile fails on autograd functions where no gradients are recorded.
    compute = LinearWithKron.apply if torch.is_grad_enabled() else _linear_with_kron
    y: Tensor = compute(x, weight, bias, *flat)
    return y


class Frozen(Protocol):
    """A frozen linear layer whose weight is not plain numbers, such as a quantized one."""

    def __call__(self, x: Tensor) -> Tensor:
        """Wx + bias, (..., d), in memory that is nobody else's."""

    def input_gradient(self, gy: Tensor) -> Tensor:
        """Wᵀ gy, (..., h), in a new tensor."""


def frozen_with_kron(x: Tensor, frozen: Frozen, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`linear_with_kron` for a layer that computes by itself; the dtype is that of what it gives."""
    flat = [factor for pair in factors for factor in pair]
    y: Tensor = FrozenWithKron.apply(x, frozen, *flat)
    return y


def _linear_with_kron(x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
    x, pairs = x.contiguous(), in_pairs(factors, x.dtype)
    if merges(weight, pairs, num_inputs(x)):
        return functional.linear(x, merged_weight(weight, pairs), bias)
    y = functional.linear(x, weight, bias)
    add_products(y, x, pairs)
    return y


class LinearWithKron(torch.autograd.Function):
    """`linear_with_kron` for autograd, with the factors of all adapters in a row: A, B, A, B, …."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        """Compute y; keep x, and references to the parameters, as far as a gradient will need them."""
        # Not in setup_context, for which PyTorch inspects this signature in every call.
        wants_x, _, _, *wants_factors = ctx.needs_input_grad
        ctx.save_for_backward(x if any(wants_factors) else None, weight if wants_x else None, *factors)
        return _linear_with_kron(x, weight, bias, *factors)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Only the gradients that are asked for."""
        x, weight, *factors = ctx.saved_tensors
        x, gy, pairs = None if x is None else x.contiguous(), gy.contiguous(), in_pairs(factors, gy.dtype)
        wanted = ctx.needs_input_grad[3:]
        if weight is None or merges(weight, pairs, num_inputs(gy)):
            gx = None if weight is None else gy @ merged_weight(weight, pairs)
            _, gradients = back_through_products(gy, None, x, pairs, wanted)
        else:
            gx, gradients = back_through_products(gy, gy @ weight, x, pairs, wanted)
        return gx, None, None, *gradients  # autograd casts them to the factors' dtypes


class FrozenWithKron(torch.autograd.Function):
    """`frozen_with_kron` for autograd, with the factors of all adapters in a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, *factors: Tensor) -> Tensor:
        """Compute y; keep x, AX of each pair, and references to the layer and the parameters."""
        ctx.frozen = frozen
        y = frozen(x).contiguous()
        with torch.autocast(y.device.type, enabled=False):
            kept = add_products(y, x.to(y.dtype).contiguous(), in_pairs(factors, y.dtype))
        ctx.save_for_backward(x, *factors, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Only the gradients that are asked for."""
        wants_x, _, *wanted = ctx.needs_input_grad
        x, *rest = ctx.saved_tensors
        factors, kept = rest[: len(wanted)], rest[len(wanted) :]
        gy, pairs = gy.contiguous(), in_pairs(factors, gy.dtype)
        gx = ctx.frozen.input_gradient(gy) if wants_x else None
        gx, gradients = back_through_products(gy, gx, x.to(gy.dtype).contiguous(), pairs, wanted, kept)
        return gx, None, *gradients


def add_products(y: Tensor, x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
    """y += Σ (A ⊗ B)x, in place; AX of each pair whose A comes first."""
    kept: list[Tensor | None] = []
    for A, B in pairs:
        if _a_first(A, B):
            kept.append(_add_a_first(y, x, A, B))
        else:
            _add_b_first(y, x, A, B)
            kept.append(None)
    return kept


def back_through_products(
    gy: Tensor,
    gx: Tensor | None,
    x: Tensor | None,
    pairs: list[tuple[Tensor, Tensor]],
    wanted: Sequence[bool],
    kept: Sequence[Tensor | None] = (),
) -> tuple[Tensor | None, list[Tensor | None]]:
    """gx, if any, with the adapters' part of the input's gradient added in place; and the factors' gradients."""
    gradients: list[Tensor | None] = []
    for number, (A, B) in enumerate(pairs):
        wants = wanted[2 * number : 2 * number + 2]
        if _a_first(A, B):
            gradients += _backward_a_first(gy, gx, x, A, B, *wants, AX=kept[number] if kept else None)
        else:
            gradients += _backward_b_first(gy, gx, x, A, B, *wants)
    return gx, gradients


def in_pairs(factors: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of each product, of factors in a row, in x's dtype."""
    cast = [factor.to(dtype) for factor in factors]
    return list(zip(cast[::2], cast[1::2], strict=True))


def _shapes(A: Tensor, B: Tensor) -> FactorShapes:
    return FactorShapes(A.shape[0], A.shape[1], B.shape[0], B.shape[1])


def _a_first(A: Tensor, B: Tensor) -> bool:
    return cheapest_order(_shapes(A, B)) == "A first"


def merges(weight: Tensor, pairs: list[tuple[Tensor, Tensor]], tokens: int) -> bool:
    """Whether W + Σ A ⊗ B is built, for as long as one product takes.

    Never in half precision, nor where products may round to it: there the sum would lose the bits of the update.
    """
    return (
        weight.is_cpu
        and weight.dtype in (torch.float32, torch.float64)
        and _multiplies_in_full_precision()
        and all(merging_pays(_shapes(A, B), tokens) for A, B in pairs)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _multiplies_in_full_precision() -> bool:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:  # before torch 2.9; later, asking for the one setting is an error if another is in use
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("ieee", "none")


def merged_weight(weight: Tensor, pairs: list[tuple[Tensor, Tensor]], memory: Tensor | None = None) -> Tensor:
    """W + Σ A ⊗ B, in memory of W's size if that is given, for which no gradients can be recorded."""
    merged = weight
    for A, B in pairs:
        split = (A.shape[0], B.shape[0], A.shape[1], B.shape[1])
        out = None if memory is None else memory.view(split)
        merged = torch.addcmul(merged.reshape(split), A[:, None, :, None], B[:, None, :], out=out).view(weight.shape)
    return merged


# In the names below n is the number of inputs, X is x as n × a2 × b2 and Y is y as n × a1 × b1. Products with A are
# bmm and not matmul, which rounds otherwise when A asks for a gradient than when it does not.


def _add_a_first(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Y += (AX)Bᵀ; AX."""
    (a1, a2), (b1, b2), n = A.shape, B.shape, num_inputs(x)
    AX = torch.bmm(A.expand(n, -1, -1), x.view(n, a2, b2))
    y.view(n * a1, b1).addmm_(AX.view(n * a1, b2), B.T)
    return AX


def _backward_a_first(
    gy: Tensor,
    gx: Tensor | None,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    want_a: bool,
    want_b: bool,
    *,
    AX: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    (a1, a2), (b1, b2), n = A.shape, B.shape, num_inputs(gy)
    GY, gA, gB = gy.view(n * a1, b1), None, None
    if want_a or gx is not None:
        gAX = _narrow_product(GY, B).view(n, a1, b2)
        if want_a and x is not None:
            gA = _sum_of_products(gAX, x.view(n, a2, b2))
        if gx is not None:
            gx.view(n, a2, b2).baddbmm_(A.T.expand(n, -1, -1), gAX)
    if want_b and x is not None:
        if AX is None:
            AX = torch.bmm(A.expand(n, -1, -1), x.view(n, a2, b2))
        AX = AX.view(n * a1, b2)
        # The second is faster, and the first spares a copy after autograd's cast.
        gB = GY.T @ AX if gy.dtype in (torch.bfloat16, torch.float16) else (AX.T @ GY).T
    return gA, gB


def _add_b_first(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> None:
    """Y += A(XBᵀ)."""
    (a1, a2), (b1, b2), n = A.shape, B.shape, num_inputs(x)
    XB = (x.view(n * a2, b2) @ B.T).view(n, a2, b1)
    y.view(n, a1, b1).baddbmm_(A.expand(n, -1, -1), XB)


def _backward_b_first(
    gy: Tensor, gx: Tensor | None, x: Tensor | None, A: Tensor, B: Tensor, want_a: bool, want_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    (a1, a2), (b1, b2), n = A.shape, B.shape, num_inputs(gy)
    GY, gA, gB = gy.view(n, a1, b1), None, None
    if want_b or gx is not None:
        gXB = torch.bmm(A.T.expand(n, -1, -1), GY).view(n * a2, b1)
        if want_b and x is not None:
            gB = gXB.T @ x.view(n * a2, b2)
        if gx is not None:
            gx.view(n * a2, b2).addmm_(gXB, B)
    if want_a and x is not None:
        XB = (x.view(n * a2, b2) @ B.T).view(n, a2, b1)
        gA = _sum_of_products(GY, XB)
    return gA, gB


def _narrow_product(P: Tensor, Q: Tensor) -> Tensor:
    """PQ. CPUs multiply by a matrix of fewer columns than a vector register takes faster if it lies in columns."""
    return functional.linear(P, Q.T.contiguous()) if Q.is_cpu and Q.shape[1] < 16 else P @ Q


def _sum_of_products(P: Tensor, Q: Tensor) -> Tensor:
    """Σ P[i] Q[i]ᵀ over the first dimension: n × p × c and n × q × c to p × q."""
    (n, p, c), q = P.shape, Q.shape[1]
    if p * q <= (p + q) * c:  # the n products are smaller than copies of P and Q
        return torch.bmm(P, Q.mT).sum(0)
    return P.transpose(0, 1).reshape(p, n * c) @ Q.transpose(1, 2).reshape(n * c, q)


def num_inputs(x: Tensor) -> int:
    """How many vectors of h there are in x."""
    return x.numel() // x.shape[-1] if x.shape[-1] else 0
