"""Adding Σ A ⊗ B to a weight in place, and taking it out again bit for bit.

Subtracting what was added does not restore a rounded weight: between 0.05% and 17% of the entries come back one or
more units off, depending on the size of the update. `merge_` therefore tries the subtraction itself and keeps the
original bits of just those entries. `unmerge_` repeats the subtraction and puts them back. Both go through
the weight in chunks of rows, so no temporary is as large as the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import MergeError
from .ops import kron_rows

Term = tuple[Tensor, Tensor]
"""One adapter's part of an update: s·A and B, in the arithmetic's dtype. Kept for `unmerge_`, so never changed."""

MERGEABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_CHUNK_ENTRIES = 1 << 19
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Restoration:
    """What `unmerge_` needs beside the terms: per chunk of rows, the entries that subtraction does not restore.

    A chunk holds (indices into the flattened chunk, original values); (None, all original values) where that is
    smaller.
    """

    dtype: torch.dtype
    chunks: list[tuple[Tensor | None, Tensor]]

    @property
    def entries(self) -> int:
        """How many original weights are kept."""
        return sum(values.numel() for _, values in self.chunks)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept weights and their indices."""
        return sum(t.nbytes for chunk in self.chunks for t in chunk if t is not None)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that updates of a weight of `dtype` are computed in: fp32, or the weight's own if that is wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_mergeable(weight: Tensor, terms: list[Term]) -> None:
    """Raise `MergeError` if weight + Σ A ⊗ B, rounded to the weight's dtype, holds an infinity or a NaN."""
    if not weight.numel():
        return
    lowest, highest = weight.aminmax()
    bound = torch.maximum(-lowest, highest).to(arithmetic_dtype(weight.dtype))
    for A, B in terms:
        bound = bound + A.abs().amax() * B.abs().amax()
    # Half of the range leaves room for the roundings; a NaN fails the comparison.
    if bool(bound < torch.finfo(weight.dtype).max / 2):
        return
    for rows, delta, space in _chunks(weight, terms):
        if not bool(torch.isfinite(torch.add(rows, delta, out=space).to(weight.dtype)).all()):
            raise MergeError("the merged weight would hold an infinity or a NaN")


def merge_(weight: Tensor, terms: list[Term]) -> Restoration:
    """weight += Σ A ⊗ B in place, rounded once; returns what `unmerge_` needs to undo it exactly.

    Args:
        weight: d × h, fp16, bf16, fp32 or fp64.
        terms: (s·A, B) pairs with a1·b1 = d and a2·b2 = h, in `arithmetic_dtype(weight.dtype)`.
    """
    chunks = []
    for rows, delta, space in _chunks(weight, terms):
        merged = torch.add(rows, delta, out=space).to(weight.dtype)
        restored = torch.sub(merged, delta, out=delta).to(weight.dtype)
        chunks.append(_unrestored(rows, restored))
        rows.copy_(merged)
    return Restoration(weight.dtype, chunks)


def unmerge_(weight: Tensor, terms: list[Term], restoration: Restoration) -> None:
    """Give back, bit for bit, the weight that `merge_(weight, terms)` changed; its dtype must still be the same."""
    for (rows, delta, _), (indices, values) in zip(_chunks(weight, terms), restoration.chunks, strict=True):
        values = values.to(weight.device)
        if indices is None:
            rows.copy_(values)
            continue
        rows.sub_(delta)
        rows.put_(indices.to(weight.device, torch.int64), values)


def _chunks(weight: Tensor, terms: list[Term]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some rows of the weight at a time, Σ A ⊗ B of these rows, and space for arithmetic on them.

    All chunks share the same memory for the latter two: writing to fresh memory costs more than the arithmetic.
    """
    d, h = weight.shape
    step = max(1, _CHUNK_ENTRIES // max(1, h))
    terms = [(A.to(weight.device), B.to(weight.device)) for A, B in terms]
    sums, spaces = weight.new_empty((2, min(step, d), h), dtype=arithmetic_dtype(weight.dtype))
    for start in range(0, d, step):
        rows = weight[start : start + step]
        delta, space = sums[: len(rows)], spaces[: len(rows)]
        for number, (A, B) in enumerate(terms):
            kron_rows(A, B, start, start + len(rows), out=space if number else delta)
            if number:
                delta.add_(space)
        yield rows, delta, space


def _unrestored(original: Tensor, restored: Tensor) -> tuple[Tensor | None, Tensor]:
    # Compared as integers: zeros have two signs, and every bit counts.
    bits = _BITS[original.element_size()]
    indices = (original.view(bits) != restored.view(bits)).flatten().nonzero().squeeze(-1)
    entry = 4 + original.element_size()  # indices within a chunk fit into four bytes
    if len(indices) * entry < original.nbytes:
        return indices.to(torch.int32), original.take(indices)
    return None, original.clone()
