"""Rows of A ⊗ B, and A ⊗ B as rows of a larger matrix: exactly, as sums of Kronecker products.

B in c = b1/g parts of g rows each, B_0 to B_(c − 1), and e_p the p-th unit vector of c entries:

    A ⊗ B = Σ_p (A ⊗ e_p) ⊗ B_p

Row n of A ⊗ e_p stands for the rows n·g to (n + 1)·g, so rows of A ⊗ B that begin and end at multiples of g are rows
of A ⊗ e_p. Terms that have nothing but zeros there fall away: of R rows there are at most b1/gcd(b1, R).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .shapes import stacked


def rows_of(A: Tensor, B: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Rows `first` to `last` − 1 of Σ A_r ⊗ B_r, exactly, as such a sum.

    Args:
        A: a1 × a2, or terms × a1 × a2.
        B: b1 × b2, or terms × b1 × b2.
        first: first row.
        last: the one after the last.

    Returns:
        A' of terms' × (last − first)/g × a2 and B' of terms' × g × b2, where g is the greatest common divisor of b1
        and both ends.
    """
    A, B = stacked(A), stacked(B)
    g = math.gcd(B.shape[1], first, last)
    parts = B.shape[1] // g
    there = sorted({n % parts for n in range(first // g, last // g)})
    cut = _spread(A, parts)[:, :, first // g : last // g]
    pieces = B.unflatten(1, (parts, g))
    return cut[:, there].flatten(0, 1).contiguous(), pieces[:, there].flatten(0, 1).contiguous()


def among_rows(A: Tensor, B: Tensor, first: int, d: int) -> tuple[Tensor, Tensor]:
    """Σ A_r ⊗ B_r as the rows from `first` on of a matrix of d rows that is zero elsewhere.

    Args:
        A: a1 × a2, or terms × a1 × a2.
        B: b1 × b2, or terms × b1 × b2.
        first: where its rows begin.
        d: rows of the larger matrix.

    Returns:
        A' of terms' × d/g × a2 and B' of terms' × g × b2, where g is the greatest common divisor of b1, `first` and d.
    """
    A, B = with_b_rows(stacked(A), stacked(B), math.gcd(B.shape[-2], first, d))
    g = B.shape[1]
    larger = A.new_zeros(len(A), d // g, A.shape[2])
    larger[:, first // g : first // g + A.shape[1]] = A
    return larger, B


def with_b_rows(A: Tensor, B: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """The same sum with more terms, whose B have g rows; g is a divisor of b1."""
    A, B = stacked(A), stacked(B)
    parts = B.shape[1] // g
    return _spread(A, parts).flatten(0, 1), B.unflatten(1, (parts, g)).flatten(0, 1)


def _spread(A: Tensor, parts: int) -> Tensor:
    """A_r ⊗ e_p for each of the terms and parts: terms × parts × a1·parts × a2."""
    units = torch.eye(parts, dtype=A.dtype, device=A.device)
    return torch.einsum("rij,pq->rpiqj", A, units).flatten(2, 3)
