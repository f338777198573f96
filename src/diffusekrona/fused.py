"""A frozen linear layer and its Kronecker adapters as one step of the autograd graph.

`functional.linear(x, W, bias) + Σ s · kron_linear(x, A, B)` is the reference that this is tested against. Doing it in
one step saves passes over memory: the adapters' parts are added in place to the base's output and to the base's
input gradient, and what is kept for the backward pass is x alone, which the caller holds anyway. The small
intermediates are computed anew there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as modules

from .factors import FactorShapes, cheapest_order


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
        and not _has_listeners(layer)
        and forward_ad._current_level < 0
        and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
    )


def _is_trained(layer: nn.Linear) -> bool:
    return layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)


def _has_listeners(layer: nn.Module) -> bool:
    return bool(
        "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


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
    flat = [factor for pair in factors for factor in pair]
    # torch.compile fails on autograd functions where no gradients are recorded.
    compute = LinearWithKron.apply if torch.is_grad_enabled() else _linear_with_kron
    y: Tensor = compute(x, weight, bias, *flat)
    return y


def _linear_with_kron(x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
    x = x.contiguous()
    y = functional.linear(x, weight, bias)
    for A, B in _pairs(factors, x.dtype):
        add = _add_a_first if _a_first(A, B) else _add_b_first
        add(y, x, A, B)
    return y


class LinearWithKron(torch.autograd.Function):
    """`linear_with_kron` for autograd, with the factors of all adapters in a row: A, B, A, B, …."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        """Compute y."""
        return _linear_with_kron(x, weight, bias, *factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep x, and references to the parameters, as far as a gradient will need them."""
        x, weight, _, *factors = inputs
        wants_x, _, _, *wants_factors = ctx.needs_input_grad
        ctx.save_for_backward(x if any(wants_factors) else None, weight if wants_x else None, *factors)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Only the gradients that are asked for."""
        x, weight, *factors = ctx.saved_tensors
        x, gy = None if x is None else x.contiguous(), gy.contiguous()
        gx = None if weight is None else gy @ weight
        gradients: list[Tensor | None] = []
        wanted = ctx.needs_input_grad[3:]
        for number, (A, B) in enumerate(_pairs(factors, gy.dtype)):
            go_back = _backward_a_first if _a_first(A, B) else _backward_b_first
            gradients += go_back(gy, gx, x, A, B, *wanted[2 * number : 2 * number + 2])
        typed = (None if g is None else g.to(factor.dtype) for g, factor in zip(gradients, factors, strict=True))
        return gx, None, None, *typed


def _pairs(factors: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    cast = [factor.to(dtype) for factor in factors]
    return list(zip(cast[::2], cast[1::2], strict=True))


def _a_first(A: Tensor, B: Tensor) -> bool:
    return cheapest_order(FactorShapes(A.shape[0], A.shape[1], B.shape[0], B.shape[1])) == "A first"


# In the names below n is the number of inputs, X is x as n × a2 × b2 and Y is y as n × a1 × b1. Products with A are
# bmm and not matmul, which rounds otherwise when A asks for a gradient than when it does not.


def _add_a_first(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> None:
    """Y += (AX)Bᵀ."""
    (a1, a2), (b1, b2), n = A.shape, B.shape, _rows(x)
    AX = torch.bmm(A.expand(n, -1, -1), x.view(n, a2, b2))
    y.view(n * a1, b1).addmm_(AX.view(n * a1, b2), B.T)


def _backward_a_first(
    gy: Tensor, gx: Tensor | None, x: Tensor | None, A: Tensor, B: Tensor, want_a: bool, want_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    (a1, a2), (b1, b2), n = A.shape, B.shape, _rows(gy)
    GY, gA, gB = gy.view(n * a1, b1), None, None
    if want_a or gx is not None:
        gAX = (GY @ B).view(n, a1, b2)
        if want_a and x is not None:
            gA = _sum_of_products(gAX, x.view(n, a2, b2))
        if gx is not None:
            gx.view(n, a2, b2).baddbmm_(A.T.expand(n, -1, -1), gAX)
    if want_b and x is not None:
        AX = torch.bmm(A.expand(n, -1, -1), x.view(n, a2, b2))
        gB = (AX.view(n * a1, b2).T @ GY).T  # faster than GYᵀ(AX), b2 being the short side
    return gA, gB


def _add_b_first(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> None:
    """Y += A(XBᵀ)."""
    (a1, a2), (b1, b2), n = A.shape, B.shape, _rows(x)
    XB = (x.view(n * a2, b2) @ B.T).view(n, a2, b1)
    y.view(n, a1, b1).baddbmm_(A.expand(n, -1, -1), XB)


def _backward_b_first(
    gy: Tensor, gx: Tensor | None, x: Tensor | None, A: Tensor, B: Tensor, want_a: bool, want_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    (a1, a2), (b1, b2), n = A.shape, B.shape, _rows(gy)
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


def _sum_of_products(P: Tensor, Q: Tensor) -> Tensor:
    """Σ P[i] Q[i]ᵀ over the first dimension: n × p × c and n × q × c to p × q."""
    (n, p, c), q = P.shape, Q.shape[1]
    if p * q <= (p + q) * c:  # the n products are smaller than copies of P and Q
        return torch.bmm(P, Q.mT).sum(0)
    return P.transpose(0, 1).reshape(p, n * c) @ Q.transpose(1, 2).reshape(n * c, q)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0
