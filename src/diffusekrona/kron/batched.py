"""A frozen linear layer with other Kronecker adapters for each part of a batch, as one step of the autograd graph.

The base's product is one for the whole batch. Each part of it, a few samples in a row, then gets its own adapters'
products, added in place, as `fused` does for all samples alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .costs import cheapest_order
from .fused import add_products, back_through_products, in_pairs, merged_weight, merges, num_inputs
from .shapes import FactorShapes

Pairs = list[tuple[Tensor, Tensor]]


class Part(NamedTuple):
    """Samples of a batch that follow each other, and what is added to their outputs.

    Attributes:
        start: first sample.
        stop: the one after the last.
        products: the numbers of their adapters' (A, B) in a list of all; none for the base alone.
    """

    start: int
    stop: int
    products: range


Chosen = list[tuple[Part, Pairs, bool]]
"""Parts, each with its products, and whether these are merged into the weight for the moment."""


def linear_with_krons(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[tuple[Tensor, Tensor]], parts: Sequence[Part]
) -> Tensor:
    """y = Wx + bias + Σ (A ⊗ B)x, the sum over the products of the part that a sample is in.

    Args:
        x: inputs, (samples, ..., h).
        weight: W, d × h, frozen, of x's dtype (under autocast, of any floating dtype).
        bias: d or None, frozen.
        factors: every (A, B), of any floating dtype. A scale belongs into A.
        parts: of all samples, in their order.

    Returns:
        (samples, ..., d), in x's dtype (under autocast, in autocast's).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    flat = [factor.to(x.dtype) for pair in factors for factor in pair]  # for both directions
    if not torch.is_grad_enabled():
        return _forward(x.contiguous(), weight, bias, in_pairs(flat, x.dtype), parts)
    y: Tensor = LinearWithKrons.apply(x, weight, bias, tuple(parts), *flat)
    return y


class LinearWithKrons(torch.autograd.Function):
    """`linear_with_krons` for autograd, with all factors in a row: A, B, A, B, …."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], *factors: Tensor
    ) -> Tensor:
        """Compute y; keep x, and references to the parameters, as far as a gradient will need them."""
        wants_x, _, _, _, *wants_factors = ctx.needs_input_grad
        ctx.save_for_backward(x if any(wants_factors) else None, weight if wants_x else None, *factors)
        ctx.parts = parts
        return _forward(x.contiguous(), weight, bias, in_pairs(factors, x.dtype), parts)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Only the gradients that are asked for; an adapter's is the sum over its parts."""
        x, weight, *factors = ctx.saved_tensors
        x, gy, pairs = None if x is None else x.contiguous(), gy.contiguous(), in_pairs(factors, gy.dtype)
        chosen, wanted = _chosen(gy, weight, pairs, ctx.parts), ctx.needs_input_grad[4:]
        gx = None if weight is None else _input_gradient(gy, weight, chosen)
        gradients: list[Tensor | None] = [None] * len(factors)
        for part, own, merged in chosen:
            rows, (first, last) = slice(part.start, part.stop), (2 * part.products.start, 2 * part.products.stop)
            into, inputs = None if gx is None or merged else gx[rows], None if x is None else x[rows]
            _, found = back_through_products(gy[rows], into, inputs, own, wanted[first:last])
            for number, gradient in enumerate(found, first):
                gradients[number] = _sum(gradients[number], gradient)
        return gx, None, None, None, *gradients


def kron_linear_each(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y[n] = (A[n] ⊗ B[n])x[n], in the cheaper order of the two products, without a loop over the samples.

    Args:
        x: inputs, (samples, ..., a2·b2).
        A: samples × a1 × a2, of x's dtype.
        B: samples × b1 × b2, likewise.

    Returns:
        (samples, ..., a1·b1).
    """
    (n, a1, a2), (_, b1, b2) = A.shape, B.shape
    tokens = math.prod(x.shape[1:-1])
    X = x.reshape(n, tokens, a2, b2)
    if cheapest_order(FactorShapes(a1, a2, b1, b2)) == "A first":
        Y = torch.bmm(torch.matmul(A.unsqueeze(1), X).flatten(1, 2), B.mT)
    else:
        Y = torch.matmul(A.unsqueeze(1), torch.bmm(X.flatten(1, 2), B.mT).view(n, tokens, a2, b1))
    return Y.reshape(*x.shape[:-1], a1 * b1)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs, parts: Sequence[Part]) -> Tensor:
    chosen = _chosen(x, weight, pairs, parts)
    if not any(merged for _, _, merged in chosen):
        y = functional.linear(x, weight, bias)
        for part, own, _ in chosen:
            add_products(y[part.start : part.stop], x[part.start : part.stop], own)
        return y
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    memory = torch.empty_like(weight, memory_format=torch.contiguous_format)  # one for all, since new memory is slow
    for part, own, merged in chosen:
        rows = slice(part.start, part.stop)
        whole = merged_weight(weight, own, memory) if merged else weight
        if bias is None:
            torch.mm(_flat(x[rows]), whole.T, out=_flat(y[rows]))
        else:
            torch.addmm(bias, _flat(x[rows]), whole.T, out=_flat(y[rows]))
        if not merged:
            add_products(y[rows], x[rows], own)
    return y


def _input_gradient(gy: Tensor, weight: Tensor, chosen: Chosen) -> Tensor:
    """Wᵀ gy, and of parts whose products are merged into W all of the gradient."""
    if not any(merged for _, _, merged in chosen):
        return gy @ weight
    return torch.cat(
        [
            gy[part.start : part.stop] @ (merged_weight(weight, own) if merged else weight)
            for part, own, merged in chosen
        ]
    )


def _chosen(rows: Tensor, weight: Tensor | None, pairs: Pairs, parts: Sequence[Part]) -> Chosen:
    found = []
    for part in parts:
        own = pairs[part.products.start : part.products.stop]
        tokens = num_inputs(rows[part.start : part.stop])
        found.append((part, own, bool(own) and weight is not None and merges(weight, own, tokens)))
    return found


def _flat(rows: Tensor) -> Tensor:
    return rows.view(-1, rows.shape[-1])


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
