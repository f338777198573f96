"""Adding Σ A ⊗ B to a weight in place, and taking it out again bit for bit.

Subtracting what was added does not restore a rounded weight: between 0.05% and 17% of the entries come back one or
more units off, depending on the size of the update. `merge_` therefore tries the subtraction itself and keeps the
original bits of just those entries. `unmerge_` repeats the subtraction and puts them back. Both go through
the weight in chunks of rows, so no temporary is as large as the weight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import MergeError
from .products import KronRows
from .shapes import Layout


class Term(NamedTuple):
    """One product of an update: s·A and B, in the arithmetic's dtype. Kept for `unmerge_`, so never changed."""

    A: Tensor
    B: Tensor
    layout: Layout = "kron"


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
    for A, B, _ in terms:
        bound = bound + A.abs().amax() * B.abs().amax()
    # Half of the range leaves room for the roundings; a NaN fails the comparison.
    if bool(bound < torch.finfo(weight.dtype).max / 2):
        return
    for chunk in _chunks(weight, terms):
        if not bool(torch.isfinite(chunk.merge()).all()):
            raise MergeError("the merged weight would hold an infinity or a NaN")


def merge_(weight: Tensor, terms: list[Term]) -> Restoration:
    """weight += Σ A ⊗ B in place, rounded once; returns what `unmerge_` needs to undo it exactly.

    Args:
        weight: d × h, fp16, bf16, fp32 or fp64.
        terms: s·A and B with a1·b1 = d and a2·b2 = h, in `arithmetic_dtype(weight.dtype)`.
    """
    chunks = []
    for chunk in _chunks(weight, terms):
        merged = chunk.merge()
        chunks.append(chunk.unrestored(merged))
        chunk.rows.copy_(merged)
    return Restoration(weight.dtype, chunks)


def fold_(weight: Tensor, terms: list[Term]) -> None:
    """`merge_` for good: the same bits, nothing kept to undo it, several times faster."""
    for chunk in _chunks(weight, terms):
        chunk.add_(1)


def unmerge_(weight: Tensor, terms: list[Term], restoration: Restoration) -> None:
    """Give back, bit for bit, the weight that `merge_(weight, terms)` changed; its dtype must still be the same."""
    for chunk, (indices, values) in zip(_chunks(weight, terms), restoration.chunks, strict=True):
        values = values.to(weight.device)
        if indices is None:
            chunk.rows.copy_(values)
            continue
        chunk.add_(-1)
        restored = chunk.rows.contiguous()
        restored.view(-1).scatter_(0, indices.to(weight.device, torch.int64), values)
        chunk.rows.copy_(restored)  # does nothing where the rows are contiguous themselves


class _Space(threading.local):
    """Memory for computing with one chunk. Writing to fresh memory costs more than the arithmetic, so it is kept."""

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, ...] = ()

    def buffers(self, weight: Tensor, entries: int) -> tuple[Tensor, ...]:
        """Three tensors of so many entries in the arithmetic's dtype for this weight, and two in its own."""
        kept = self._buffers
        if not kept or kept[0].numel() < entries or (kept[3].dtype, kept[3].device) != (weight.dtype, weight.device):
            with torch.inference_mode(False):  # whose tensors could not be written to outside of it
                dtypes = [arithmetic_dtype(weight.dtype)] * 3 + [weight.dtype] * 2
                kept = self._buffers = tuple(weight.new_empty(entries, dtype=dtype) for dtype in dtypes)
        return kept


_space = _Space()


class _Chunk:
    """Some rows of a weight, Σ A ⊗ B of the same rows, and what is computed from both, in memory that all share."""

    def __init__(self, rows: Tensor, terms: list[KronRows], start: int, memory: tuple[Tensor, ...]) -> None:
        self.rows, self._terms, self._start = rows, terms, start
        self._sum, self._wide, self._merged, self._restored = (m[: rows.numel()].view(rows.shape) for m in memory)

    @cached_property
    def _delta(self) -> Tensor:
        for number, term in enumerate(self._terms):
            out = self._wide if number else self._sum
            update = term.write(self._start, self._start + len(self.rows), out)
            if number:
                self._sum.add_(update)
        return self._sum

    def merge(self) -> Tensor:
        return self._add(1, self.rows, out=self._merged)

    def add_(self, sign: int) -> None:
        self._add(sign, self.rows, out=self.rows)

    def _add(self, sign: int, values: Tensor, out: Tensor) -> Tensor:
        delta = self._delta
        if out.dtype == delta.dtype:
            return torch.add(values, delta, alpha=sign, out=out)
        return out.copy_(self._wide.copy_(values).add_(delta, alpha=sign))

    def unrestored(self, merged: Tensor) -> tuple[Tensor | None, Tensor]:
        """The entries of the rows that unmerging does not give back, as `Restoration` keeps them."""
        restored, bits = self._add(-1, merged, out=self._restored), _BITS[self.rows.element_size()]
        # Compared as integers: zeros have two signs, and every bit counts.
        differs = restored.view(bits).bitwise_xor_(self.rows.view(bits))
        indices = differs.view(-1).nonzero().squeeze(-1)
        if len(indices) * (4 + self.rows.element_size()) < self.rows.nbytes:
            return indices.to(torch.int32), self.rows.reshape(-1)[indices]
        return None, self.rows.clone()


def _chunks(weight: Tensor, terms: list[Term]) -> Iterator[_Chunk]:
    """The weight in chunks of rows, those that share the first term's inner rows after each other."""
    products = [KronRows(A.to(weight.device), B.to(weight.device), layout) for A, B, layout in terms]
    outer, inner = products[0].outer_rows, products[0].inner_rows
    most = max(1, _CHUNK_ENTRIES // max(1, weight.shape[1]))
    inner_step, outer_step = min(inner, most), max(1, most // max(1, inner))
    products[0].memory, *memory = _space.buffers(weight, min(weight.numel(), most * weight.shape[1]))
    for k in range(0, inner, inner_step):
        for i in range(0, outer, outer_step):
            start = i * inner + k
            stop = start + outer_step * inner if inner_step == inner else i * inner + min(k + inner_step, inner)
            yield _Chunk(weight[start:stop], products, start, tuple(memory))
