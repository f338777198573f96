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


class KronRows:
    """A ⊗ B a few rows at a time, as products of whole rows: one of A with every entry repeated, one of B tiled.

    Each entry is one product of two floats, so it has the same bits on every device and in every chunking. Tiling
    costs more than multiplying, so the last tiles are kept: the same rows of B are best asked for in a row.

    Args:
        A: a1 × a2.
        B: b1 × b2.
        memory: where to keep the tiles; as many entries as the rows of B that are asked for at a time, times a2·b2.
    """

    def __init__(self, A: Tensor, B: Tensor, memory: Tensor | None = None) -> None:
        self._A, self._B, self._memory = A, B, memory
        self._tiled, self._rows_tiled = B, (0, 0)

    def write(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows `start` to `stop`, written to `out`, (stop - start) × a2·b2 and contiguous, which is returned."""
        (b1, b2), done = self._B.shape, start
        while done < stop:
            i, k = divmod(done, b1)
            whole = 0 if k else (stop - done) // b1
            blocks, rows = (whole, b1) if whole else (1, min(b1 - k, stop - done))
            of_a = self._A[i : i + blocks].repeat_interleave(b2, dim=1)
            part = out[done - start : done - start + blocks * rows].view(blocks, rows, of_a.shape[1])
            torch.mul(of_a.unsqueeze(1), self._tiles(k, k + rows), out=part)
            done += blocks * rows
        return out

    def _tiles(self, start: int, stop: int) -> Tensor:
        if self._rows_tiled != (start, stop):
            rows, a2 = self._B[start:stop], self._A.shape[1]
            memory = rows.new_empty(rows.numel() * a2) if self._memory is None else self._memory[: rows.numel() * a2]
            tiled = memory.view(len(rows), a2, rows.shape[1]).copy_(rows.unsqueeze(1))
            self._tiled, self._rows_tiled = tiled.flatten(1), (start, stop)
        return self._tiled


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
