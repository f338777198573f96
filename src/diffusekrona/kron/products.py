"""(A ⊗ B)x and rows of A ⊗ B, from the factors alone: tensors in, tensors out.

`torch.kron(A, B)` is the reference that each function here is tested against.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from .costs import cheapest_conv_order, cheapest_order
from .shapes import FactorShapes, Layout

_Pair = int | tuple[int, ...]


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

    Examples:
        >>> A, B, x = torch.randn(4, 2), torch.randn(2, 3), torch.randn(5, 6)
        >>> y = kron_linear(x, A, B)
        >>> y.shape
        torch.Size([5, 8])
        >>> torch.allclose(y, x @ torch.kron(A, B).T, atol=1e-5)
        True
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


def kron_conv2d(
    x: Tensor, A: Tensor, B: Tensor, stride: _Pair = 1, padding: _Pair | str = 0, dilation: _Pair = 1
) -> Tensor:
    """y = conv2d(x, A ⊗ B), B carrying the kernel, without building A ⊗ B, by the cheaper order of both products.

    y[i·b1 + k] = Σ_j Σ_l A[i, j] · conv2d(x[j·b2 + l], B[k, l])

    Args:
        x: images, (batch, a2·b2, height, width), or without the batch.
        A: a1 × a2.
        B: b1 × b2 × kernel height × kernel width.
        stride: as `torch.nn.functional.conv2d` takes it.
        padding: likewise.
        dilation: likewise.

    Returns:
        (batch, a1·b1, height, width of the convolution's output), without the batch if x has none.
    """
    (a1, a2), (b1, b2) = A.shape, B.shape[:2]
    images = x if x.dim() == 4 else x.unsqueeze(0)
    X = images.unflatten(1, (a2, b2))

    def convolved(blocks: Tensor) -> Tensor:
        """Each of the blocks, batch × n × b2 × height × width, convolved with B."""
        y = functional.conv2d(blocks.flatten(0, 1), B, None, stride, padding, dilation)
        return y.view(*blocks.shape[:2], *y.shape[1:])

    def mixed(blocks: Tensor) -> Tensor:
        """A times the blocks, batch × a2 × channels × height × width."""
        return torch.matmul(A, blocks.flatten(2)).view(-1, a1, *blocks.shape[2:])

    a_first = cheapest_conv_order(FactorShapes(a1, a2, b1, b2), B.shape[2] * B.shape[3]) == "A first"
    y = (convolved(mixed(X)) if a_first else mixed(convolved(X))).flatten(1, 2)
    return y if x.dim() == 4 else y.squeeze(0)


def dense_update(terms: Iterable[tuple[Tensor, Tensor]], layout: Layout = "kron") -> Tensor:
    """Σ A ⊗ B as a matrix, its rows in the layout's order: what everything else here avoids to build."""
    pairs = list(terms)
    # torch.kron refuses some factors that have one column only, by their strides.
    delta = sum_of((A[:, None, :, None] * B[None, :, None, :]).flatten(2).flatten(0, 1) for A, B in pairs)
    if layout == "kron":
        return delta
    a1, b1 = len(pairs[0][0]), len(pairs[0][1])
    return delta.view(a1, b1, -1).transpose(0, 1).reshape(a1 * b1, -1)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of one tensor or more."""
    first, *rest = parts
    return sum(rest, start=first)


class KronRows:
    """A ⊗ B a few rows at a time, as products of whole rows: one of A with every entry repeated, one of B tiled.

    Each entry is one product of two floats, so it has the same bits on every device and in every chunking. Tiling
    costs more than multiplying, so the last inner rows are kept: the same ones are best asked for in a row.

    Attributes:
        outer_rows: of A, a1, with which A ⊗ B counts in steps of `inner_rows`; of B in the transposed layout.
        inner_rows: of B, b1; of A in the transposed layout.
        memory: where to keep the inner rows that are asked for at a time, each of a2·b2 entries; None for new memory.
    """

    def __init__(self, A: Tensor, B: Tensor, layout: Layout = "kron", memory: Tensor | None = None) -> None:
        self._A, self._B, self._transposed, self.memory = A, B, layout == "transposed", memory
        counts = (A.shape[0], B.shape[0])
        self.outer_rows, self.inner_rows = counts[::-1] if self._transposed else counts
        self._inner, self._inner_range = B, (0, 0)

    def write(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows `start` to `stop`, written to `out`, (stop - start) × a2·b2 and contiguous, which is returned."""
        done = start
        while done < stop:
            i, k = divmod(done, self.inner_rows)
            whole = 0 if k else (stop - done) // self.inner_rows
            blocks, rows = (whole, self.inner_rows) if whole else (1, min(self.inner_rows - k, stop - done))
            outer = self._wide(i, i + blocks, of_b=self._transposed)
            part = out[done - start : done - start + blocks * rows].view(blocks, rows, outer.shape[1])
            torch.mul(outer.unsqueeze(1), self._inner_rows(k, k + rows), out=part)
            done += blocks * rows
        return out

    def _inner_rows(self, start: int, stop: int) -> Tensor:
        if self._inner_range != (start, stop):
            memory, size = self.memory, (stop - start) * self._A.shape[1] * self._B.shape[1]
            self._inner = self._wide(start, stop, not self._transposed, None if memory is None else memory[:size])
            self._inner_range = (start, stop)
        return self._inner

    def _wide(self, start: int, stop: int, of_b: bool, memory: Tensor | None = None) -> Tensor:
        """Rows of one factor, as wide as those of A ⊗ B: A's entries repeated or B's tiled."""
        size = (stop - start, self._A.shape[1], self._B.shape[1])
        rows = self._B[start:stop].unsqueeze(1) if of_b else self._A[start:stop].unsqueeze(2)
        wide = self._A.new_empty(size) if memory is None else memory.view(size)
        return wide.copy_(rows).flatten(1)


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
