"""MergedWeight: the terms that a base layer's weight holds, and what gives the weight back as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..kron.exact import Keep, Restoration, Term, check_mergeable, fold_, merge_, subtract_, unmerge_
from .compat import offload_folder
from .quantized import Original, carrier, check_format, dequantized, is_quantized, put_back, replace

Terms = dict[str, list[Term]]
"""Adapter name → the products that its update sums."""

ROUNDED = (
    "An adapter that was merged with exact=False is subtracted from the weights, which are now what they were to "
    "rounding, not bit for bit."
)
"""Said where weights do not come back exactly."""


class MergedWeight:
    """What is merged into one base layer's weight. The sum over all adapters is rounded once.

    Attributes:
        terms: what the weight holds; empty while nothing is merged.
        restoration: what is kept to take it out again, of a quantized weight the old one; None while nothing is
            merged.
    """

    def __init__(self) -> None:
        self.terms: Terms = {}
        self.restoration: Restoration | Original | None = None

    def copy(self) -> MergedWeight:
        """The same, for another base layer with the same weight."""
        other = MergedWeight()
        other.terms, other.restoration = dict(self.terms), self.restoration
        return other

    @property
    def keep(self) -> Keep | None:
        """What was kept when plain numbers were merged into; None while nothing is merged, or a weight is quantized."""
        return self.restoration.keep if isinstance(self.restoration, Restoration) else None

    @torch.no_grad()
    def check(self, base: nn.Module, terms: Terms, keep: Keep | None = None) -> None:
        """Raise `MergeError` if the base's weight cannot hold these terms; changes nothing.

        Args:
            base: the layer.
            terms: all that it would hold.
            keep: what would be kept; None for whatever is.
        """
        if None not in (keep, self.keep) and (keep == "nothing") != (self.keep == "nothing"):
            before, now = ("without", "with") if self.keep == "nothing" else ("with", "without")
            raise MergeError(
                f"{', '.join(self.terms)} is merged into it {before} what an exact unmerge needs, and now it would be "
                f"{now}; unmerge first, or merge with the same exact"
            )
        if terms.keys() == self.terms.keys():
            return
        _check_format(base)
        self.check_undoable(base)
        check_mergeable(self._unmerged(base), _all(terms))

    def _unmerged(self, base: nn.Module) -> Tensor:
        """The base's weight as a matrix without what is merged into it, in a copy if anything is."""
        if is_quantized(base):
            original = self.restoration if isinstance(self.restoration, Original) else None
            return dequantized(base, original).to(carrier(base))
        matrix = _matrix(base)
        if isinstance(self.restoration, Restoration):
            matrix = matrix.clone()
            unmerge_(matrix, _all(self.terms), self.restoration)
        return matrix

    def check_undoable(self, base: nn.Module) -> None:
        """Raise `MergeError` if the weight was cast to another dtype while merged."""
        weight = base.weight
        assert isinstance(weight, Tensor)
        if self.restoration is not None and weight.dtype != self.restoration.dtype:
            raise MergeError(
                f"the base weight was merged in {self.restoration.dtype} and is now {weight.dtype}, so its original "
                "bits are lost; cast only unmerged models"
            )

    @torch.no_grad()
    def set(self, base: nn.Module, terms: Terms, keep: Keep | None = None) -> None:
        """Make exactly these terms, which `check` has passed, the ones that the base's weight holds.

        Args:
            base: the layer.
            terms: all that it is to hold.
            keep: what to keep; None for what is kept already, by default what makes unmerging exact. Of a quantized
                weight, the old one is kept whatever it is.

        Raises:
            MergeError: as in `check_undoable`.
        """
        if terms.keys() == self.terms.keys():
            return
        self.check_undoable(base)
        keep = keep or self.keep or "entries"
        if self.keep == "nothing":
            self._exchange(base, terms)
            return
        if isinstance(self.restoration, Original):
            put_back(base, self.restoration)
        elif self.restoration is not None:
            with _changed(base) as weight:
                unmerge_(weight, _all(self.terms), self.restoration)
        self.terms, self.restoration = {}, None
        if terms and is_quantized(base):
            self.restoration = _replace(base, terms)
        elif terms:
            with _changed(base) as weight:
                self.restoration = merge_(weight, _all(terms), keep)
        self.terms = terms

    def _exchange(self, base: nn.Module, terms: Terms) -> None:
        """`set` where nothing was kept: what is no longer wanted is subtracted, and what is new added."""
        gone = {name: own for name, own in self.terms.items() if name not in terms}
        new = {name: own for name, own in terms.items() if name not in self.terms}
        with _changed(base) as weight:
            if gone:
                warnings.warn(ROUNDED, stacklevel=2)
                subtract_(weight, _all(gone))
            if new:
                fold_(weight, _all(new))
        self.terms, self.restoration = terms, self.restoration if terms else None

    @torch.no_grad()
    def fold(self, base: nn.Module, terms: Terms) -> None:
        """`set` for good: keeps nothing that could undo it, which is several times faster."""
        if self.keep == "nothing":
            self.set(base, terms)
        elif terms.keys() != self.terms.keys():
            self.set(base, {})
            if is_quantized(base):
                _replace(base, terms)
            else:
                with _changed(base) as weight:
                    fold_(weight, _all(terms))
        self.terms, self.restoration = {}, None


def check_in_memory(model: nn.Module) -> None:
    """Raise `MergeError` if Diffusers keeps weights of a model in files, where a merge would be lost."""
    for name, module in model.named_modules():
        folder = offload_folder(module)
        if folder is not None:
            raise MergeError(
                f"The weights of {name or 'the model'} are offloaded to {folder}, where "
                "nothing can be merged into them: merge first, then apply the group offloading. Nothing was merged."
            )


def _all(terms: Terms) -> list[Term]:
    return [term for of_adapter in terms.values() for term in of_adapter]


def _replace(base: nn.Module, terms: Terms) -> Original:
    numbers = dequantized(base)
    fold_(numbers, _all(terms))
    return replace(base, numbers)


def _check_format(base: nn.Module) -> None:
    if is_quantized(base):
        check_format(base)
    elif not isinstance(base, nn.Conv2d):
        weight: Any = base.weight
        sizes = getattr(base, "out_features", None), getattr(base, "in_features", None)
        if tuple(weight.shape) != sizes:
            raise MergeError(
                f"the base layer, a {type(base).__name__}, keeps a weight of shape {tuple(weight.shape)} and not "
                f"{sizes}; load the base unquantized"
            )


def _matrix(base: nn.Module) -> Tensor:
    """The base's weight as a matrix, a convolution's with the kernel in its columns; a copy in channels_last."""
    weight: Any = base.weight
    matrix: Tensor = weight.flatten(1)
    return matrix


@contextmanager
def _changed(base: nn.Module) -> Iterator[Tensor]:
    """The base's weight as a matrix to be changed in place."""
    weight: Any = base.weight
    matrix = _matrix(base)
    yield matrix
    if matrix.data_ptr() != weight.data_ptr():
        weight.copy_(matrix.view(weight.shape))
