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


def joined(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum of products with fewer terms, where their bits show how: what `rows_of` and `among_rows` cut.

    Terms of equal B are one; and terms of the same A for other parts of the rows are one with a larger B.

    Args:
        A: terms × a1 × a2.
        B: terms × b1 × b2.
    """
    alike: list[tuple[Tensor, Tensor]] = []
    for own_A, own_B in zip(A.unbind(), B.unbind(), strict=True):
        same = next((n for n, (_, other) in enumerate(alike) if torch.equal(own_B, other)), None)
        if same is None:
            alike.append((own_A, own_B))
        else:
            alike[same] = (alike[same][0] + own_A, own_B)
    parts = len(alike)
    spread = [_unspread(own_A, parts) for own_A, _ in alike]
    places = {place for found in spread if found is not None for place in [found[0]]}
    first = spread[0]
    if parts > 1 and first and len(places) == parts and all(s and torch.equal(s[1], first[1]) for s in spread):
        ordered = sorted(range(parts), key=lambda n: spread[n][0])  # type: ignore[index]
        return first[1].unsqueeze(0), torch.cat([alike[n][1] for n in ordered]).unsqueeze(0)
    return torch.stack([own for own, _ in alike]), torch.stack([own for _, own in alike])


def _unspread(A: Tensor, parts: int) -> tuple[int, Tensor] | None:
    """p and the A of an A ⊗ e_p; None where it is no such product."""
    if A.shape[0] % parts:
        return None
    rows = A.unflatten(0, (-1, parts))
    there = [p for p in range(parts) if bool(rows[:, p].any())]
    return (there[0], rows[:, there[0]]) if len(there) == 1 else None
