"""Rows of one layer's update as the update of another: where a file has one layer and a model several, or the reverse.

Rows of LoRA and LoHa are rows of their left factors. Those of Kronecker products are sums of smaller ones, see
`kron.rows`. DoRA's magnitudes go with the rows where each output has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterFileError
from ..kron.rows import among_rows, rows_of, with_b_rows
from ..kron.shapes import packed, stacked
from .formats.full import Full
from .formats.library import LibraryUpdate
from .formats.loha import LoHa
from .formats.lora import LoRA
from .formats.updates import KroneckerUpdate, Update
from .layouts.layout import Rows


class Piece(NamedTuple):
    """A layer's update in a file, and where it goes in a module of a model.

    Attributes:
        update: of all rows that go there.
        into: first row of the module's weight and the one after the last; None for all.
    """

    update: Update
    into: Rows | None = None


@dataclass(frozen=True, eq=False)
class Assembled(Update):
    """ΔW of a module that several layers of a file make; rows that none of them has stay as they are.

    Attributes:
        pieces: each with the rows that it goes into.
        outputs: rows of the module's weight.
    """

    pieces: tuple[tuple[Update, Rows], ...]
    outputs: int

    @property
    def bias_only(self) -> bool:
        """Whether the weight stays as it is."""
        return not self._of_weight()

    @property
    def has_delta(self) -> bool:
        """Whether ΔW of every piece is the same for every weight."""
        return all(update.has_delta for update, _ in self.pieces)

    def delta(self) -> Tensor:
        """ΔW in fp32."""
        deltas = [(update.delta(), into) for update, into in self._of_weight()]
        whole = deltas[0][0].new_zeros(self.outputs, *deltas[0][0].shape[1:])
        for delta, (first, last) in deltas:
            whole[first:last] = delta
        return whole

    def change(self, weight: Tensor) -> Tensor:
        """W' − W in fp32, of each piece by the rows that it goes into."""
        whole = torch.zeros_like(weight, dtype=torch.float32)
        for update, (first, last) in self._of_weight():
            whole[first:last] = update.change(weight[first:last])
        return whole

    def _of_weight(self) -> list[tuple[Update, Rows]]:
        return [(update, into) for update, into in self.pieces if not update.bias_only]


def cut(update: Update, rows: Rows, outputs: int) -> Update:
    """The update of some rows of the layer that an update is for.

    Args:
        update: of `outputs` rows.
        rows: first row, and the one after the last.
        outputs: how many there should be; the file is for another model if there are not.

    Raises:
        AdapterFileError: there are not; or the method gives no update of single rows.
    """
    if isinstance(update, LibraryUpdate):
        return update.of_rows(*rows)
    first, last = rows
    found = _outputs(update)
    if found != outputs:
        raise AdapterFileError(
            f"{update.where} has {found} outputs, and the layers of this model that it stands for have {outputs} "
            "together; the file is for another model."
        )
    common = {
        "where": update.where,
        "kind": update.kind,
        "parameters": update.parameters * (last - first) // outputs,
        "dora_scale": _rows_of_magnitudes(update, rows, outputs),
        "bias": None if update.bias is None else update.bias[first:last],
    }
    if isinstance(update, KroneckerUpdate) and update.layout == "kron":
        A, B = rows_of(update.A, update.B, first, last)
        common["parameters"] = A.numel() + B.numel()
        return replace(update, A=packed(A), held_b=packed(B), **common)  # type: ignore[arg-type]
    if isinstance(update, LoRA):
        return replace(update, up=update.up[first:last], **common)  # type: ignore[arg-type]
    if isinstance(update, LoHa):
        left = [f if update.cores is None else f.mT for f in (update.w1_a, update.w2_a)]
        w1_a, w2_a = (f[first:last] if update.cores is None else f[first:last].mT for f in left)
        return replace(update, w1_a=w1_a, w2_a=w2_a, **common)  # type: ignore[arg-type]
    if isinstance(update, Full) and update.diff is None:
        return replace(update, **common)  # type: ignore[arg-type]
    return Full(update.delta()[first:last], **common)  # type: ignore[arg-type]


def assembled(pieces: Sequence[Piece], outputs: int) -> Update:
    """The update of a module of `outputs` rows that these pieces make: Kronecker products where all of them are.

    Raises:
        AdapterFileError: a piece has another number of rows than it goes into.
    """
    if len(pieces) == 1 and pieces[0].into is None:
        return pieces[0].update
    placed = [(piece.update, piece.into or (0, outputs)) for piece in pieces]
    for update, (first, last) in placed:
        if _outputs(update) not in (last - first, None):
            raise AdapterFileError(
                f"{update.where} has {_outputs(update)} outputs, but goes into {last - first} rows of a layer; the "
                "file is for another model."
            )
    together = {
        "where": placed[0][0].where,
        "kind": placed[0][0].kind,
        "parameters": sum(update.parameters for update, _ in placed),
        "bias": _whole_bias(placed, outputs),
    }
    krona = [
        (update, into)
        for update, into in placed
        if isinstance(update, KroneckerUpdate) and update.layout == "kron" and update.dora_scale is None
    ]
    if len(krona) == len(placed) and len({(u.shapes.a2, u.shapes.b2) for u, _ in krona}) == 1:
        terms = [among_rows(stacked(u.scale * u.A), stacked(u.B), into[0], outputs) for u, into in krona]
        common = math.gcd(*(B.shape[1] for _, B in terms))
        alike = [with_b_rows(A, B, common) for A, B in terms]
        A, B = (torch.cat(factors) for factors in zip(*alike, strict=True))
        return KroneckerUpdate(packed(A), packed(B), **together)  # type: ignore[arg-type]
    return Assembled(tuple(placed), outputs, **together)  # type: ignore[arg-type]


def _outputs(update: Update) -> int | None:
    """Rows of an update's weight; None where that depends on the weight."""
    if isinstance(update, KroneckerUpdate):
        return update.shapes.d
    if isinstance(update, LoRA):
        return len(update.up)
    if isinstance(update, LoHa):
        return update.w1_a.shape[0 if update.cores is None else 1]
    if isinstance(update, Full):
        return len(update.diff if update.diff is not None else update.bias)  # type: ignore[arg-type]
    return None


def _rows_of_magnitudes(update: Update, rows: Rows, outputs: int) -> Tensor | None:
    magnitudes = update.dora_scale
    if magnitudes is None:
        return None
    if magnitudes.shape[:1] == (outputs,) and magnitudes.numel() == outputs:
        return magnitudes[rows[0] : rows[1]]
    raise AdapterFileError(
        f"{update.where} has DoRA's magnitudes for each input, over the outputs of several layers of this model "
        "together: merge it with the program that made it."
    )


def _whole_bias(placed: Sequence[tuple[Update, Rows]], outputs: int) -> Tensor | None:
    found = [(update.bias, into) for update, into in placed if update.bias is not None]
    if not found:
        return None
    whole = found[0][0].new_zeros(outputs)
    for bias, (first, last) in found:
        whole[first:last] = bias
    return whole
