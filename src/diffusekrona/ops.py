"""(A ⊗ B)x and rows of A ⊗ B, from the factors alone: tensors in, tensors out.

`torch.kron(A, B)` is the reference that each function here is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .factors import FactorShapes, cheapest_order


def kron_linear(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y = (A ⊗ B)x without building A ⊗ B, in the cheaper order of the two products (paper, eq. 4).

    y[i·b1 + k] = Σ_j Σ_l A[i, j] · B[k, l] · x[j·b2 + l]

    Args:
        x: inputs, (..., a2·b2), any leading shape, any strides.
        A: a1 × a2, of x's dtype (under autocast, of any floating dtype).
        B: b1 × b2, likewise.

    Returns:
        (..., a1·b1).

    Raises:
        ValueError: A or B is not a matrix, or x's last dimension is not a2·b2.
    """
    shapes = _factor_shapes(x, A, B)
    product = kron_linear_a_first if cheapest_order(shapes) == "A first" else kron_linear_b_first
    return product(x, A, B)


def kron_linear_a_first(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`kron_linear` by way of AX, an a1 × b2 intermediate per input, X being x as an a2 × b2 matrix."""
    X = x.unflatten(-1, (A.shape[1], B.shape[1]))
    return functional.linear(torch.matmul(A, X), B).flatten(-2)


def kron_linear_b_first(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`kron_linear` by way of XBᵀ, an a2 × b1 intermediate per input, X being x as an a2 × b2 matrix."""
    X = x.unflatten(-1, (A.shape[1], B.shape[1]))
    return torch.matmul(A, functional.linear(X, B)).flatten(-2)


def kron_rows(A: Tensor, B: Tensor, start: int, stop: int, out: Tensor | None = None) -> Tensor:
    """Rows `start` to `stop` of A ⊗ B, (stop - start) × a2·b2, written to `out` if given.

    Each entry is one product of two floats, so the result has the same bits on every device and in every chunking.
    """
    row = torch.arange(start, stop, device=A.device)
    of_a, of_b = A[row // B.shape[0]].unsqueeze(-1), B[row % B.shape[0]].unsqueeze(-2)
    blocks = None if out is None else out.unflatten(-1, (A.shape[1], B.shape[1]))
    return torch.mul(of_a, of_b, out=blocks).flatten(-2)


def _factor_shapes(x: Tensor, A: Tensor, B: Tensor) -> FactorShapes:
    if A.dim() != 2 or B.dim() != 2:
        raise ValueError(f"A and B must be matrices, got shapes {tuple(A.shape)} and {tuple(B.shape)}.")
    shapes = FactorShapes(A.shape[0], A.shape[1], B.shape[0], B.shape[1])
    if x.dim() == 0 or x.shape[-1] != shapes.h:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but A ({shapes.a1} × {shapes.a2}) and B ({shapes.b1} × {shapes.b2}) "
            f"take {shapes.a2}·{shapes.b2} = {shapes.h} features in its last dimension."
        )
    return shapes
