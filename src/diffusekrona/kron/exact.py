"""Adding Σ A ⊗ B to a weight in place, and taking it out again bit for bit.

Subtracting what was added does not restore a rounded weight: between 0.05% and 17% of the entries come back one or
more units off, depending on the size of the update. `merge_` therefore tries the subtraction itself and keeps the
original bits of just those entries. `unmerge_` repeats the subtraction and puts them back. Both go through
the weight in chunks of rows, so no temporary is as large as the weight. Who has memory may keep a copy instead, and who
needs no bits back may keep nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
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


Keep = Literal["entries", "copy", "nothing"]
"""What a merge keeps: the entries that subtraction does not restore, the whole weight, or nothing, so that unmerging is
a subtraction and right to rounding only."""

MERGEABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_CHUNK_ENTRIES = 1 << 19
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Restoration:
    """What `unmerge_` needs beside the terms: per chunk of rows, the entries that subtraction does not restore.

    A chunk holds (indices into the flattened chunk, original values); (None, all original values) where that is
    smaller, or a copy was asked for. There are no chunks where nothing is kept.
    """

    dtype: torch.dtype
    chunks: list[tuple[Tensor | None, Tensor]]
    keep: Keep = "entries"

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


def merge_(weight: Tensor, terms: list[Term], keep: Keep = "entries") -> Restoration:
    """weight += Σ A ⊗ B in place, rounded once; returns what `unmerge_` needs to undo it.

    Args:
        weight: d × h, fp16, bf16, fp32 or fp64.
        terms: s·A and B with a1·b1 = d and a2·b2 = h, in `arithmetic_dtype(weight.dtype)`.
        keep: what to keep; the merged weight has the same bits whatever it is.
    """
    chunks: list[tuple[Tensor | None, Tensor]] = []
    if keep == "nothing":
        fold_(weight, terms)
        return Restoration(weight.dtype, chunks, keep)
    for chunk in _chunks(weight, terms):
        if keep == "copy":
            chunks.append((None, chunk.rows.clone()))
            chunk.add_(1)
        else:
            merged = chunk.merge()
            chunks.append(chunk.unrestored(merged))
            chunk.rows.copy_(merged)
    return Restoration(weight.dtype, chunks, keep)


def fold_(weight: Tensor, terms: list[Term]) -> None:
    """`merge_` for good: the same bits, nothing kept to undo it, several times faster."""
    for chunk in _chunks(weight, terms):
        chunk.add_(1)


def subtract_(weight: Tensor, terms: list[Term]) -> None:
    """weight -= Σ A ⊗ B in place, rounded once: undoes `fold_` to rounding."""
    for chunk in _chunks(weight, terms):
        chunk.add_(-1)


def unmerge_(weight: Tensor, terms: list[Term], restoration: Restoration) -> None:
    """Give back, bit for bit, the weight that `merge_(weight, terms)` changed; its dtype must still be the same.

    To rounding only where the merge kept nothing.
    """
    if restoration.keep == "nothing":
        subtract_(weight, terms)
        return
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
        """Three tensors of so many entries in the arithmetic's dtype for this weight, two in its own, and flags."""
        kept = self._buffers
        if not kept or kept[0].numel() < entries or (kept[3].dtype, kept[3].device) != (weight.dtype, weight.device):
            with torch.inference_mode(False):  # whose tensors could not be written to outside of it
                dtypes = [arithmetic_dtype(weight.dtype)] * 3 + [weight.dtype] * 2 + [torch.bool]
                kept = self._buffers = tuple(weight.new_empty(entries, dtype=dtype) for dtype in dtypes)
        return kept


_space = _Space()


class _Chunk:
    """Some rows of a weight, Σ A ⊗ B of the same rows, and what is computed from both, in memory that all share."""

    def __init__(self, rows: Tensor, terms: list[KronRows], start: int, memory: tuple[Tensor, ...]) -> None:
        self.rows, self._terms, self._start = rows, terms, start
        own = [m[: rows.numel()].view(rows.shape) for m in memory]
        self._sum, self._wide, self._merged, self._restored, self._flags = own

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
        indices = _where(differs.view(-1), self._flags.view(-1))
        if len(indices) * (4 + self.rows.element_size()) < self.rows.nbytes:
            return indices.to(torch.int32), self.rows.reshape(-1)[indices]
        return None, self.rows.clone()


def _where(differs: Tensor, flags: Tensor) -> Tensor:
    """The indices, in int64, of the entries of a flat tensor that are not 0; `flags` is memory for as many booleans."""
    if not differs.is_cpu:
        return differs.nonzero().squeeze(-1)
    # PyTorch's own search took half of a merge. A copy into flags is quick, unlike a comparison. NumPy finds the first
    # few flags in a hundred slowly and those in ten quickly, so words of eight flags come first.
    found = flags.copy_(differs).numpy()
    if len(found) % 8:
        return torch.from_numpy(np.flatnonzero(found))
    words = found.view(np.uint64)
    some = np.flatnonzero(words != 0)
    within = np.flatnonzero(words[some].view(np.bool_))
    return torch.from_numpy(some[within >> 3] * 8 + (within & 7))


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
