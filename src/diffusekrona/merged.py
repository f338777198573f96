"""MergedWeight: the terms that a base layer's weight holds, and what gives the weight back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import MergeError
from .exact import MERGEABLE_DTYPES, Restoration, Term, check_mergeable, fold_, merge_, unmerge_

Terms = dict[str, list[Term]]
"""Adapter name → the products that its update sums."""


class MergedWeight:
    """What is merged into one base layer's weight. The sum over all adapters is rounded once.

    Attributes:
        terms: what the weight holds; empty while nothing is merged.
        restoration: what is kept to take it out again exactly; None while nothing is merged.
    """

    def __init__(self) -> None:
        self.terms: Terms = {}
        self.restoration: Restoration | None = None

    @torch.no_grad()
    def check(self, base: nn.Module, terms: Terms) -> None:
        """Raise `MergeError` if the base's weight cannot hold these terms; changes nothing."""
        if terms.keys() == self.terms.keys():
            return
        _check_format(base)
        before = self.terms
        self.set(base, {})
        try:
            with _matrix(base) as weight:
                check_mergeable(weight, _all(terms))
        finally:
            self.set(base, before)

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
    def set(self, base: nn.Module, terms: Terms) -> None:
        """Make exactly these terms, which `check` has passed, the ones that the base's weight holds.

        Raises:
            MergeError: as in `check_undoable`.
        """
        if terms.keys() == self.terms.keys():
            return
        self.check_undoable(base)
        with _matrix(base) as weight:
            if self.restoration is not None:
                unmerge_(weight, _all(self.terms), self.restoration)
            self.restoration = merge_(weight, _all(terms)) if terms else None
        self.terms = terms

    @torch.no_grad()
    def fold(self, base: nn.Module, terms: Terms) -> None:
        """`set` for good: keeps nothing that could undo it, which is several times faster."""
        if terms.keys() != self.terms.keys():
            self.set(base, {})
            with _matrix(base) as weight:
                fold_(weight, _all(terms))
        self.terms, self.restoration = {}, None


def _all(terms: Terms) -> list[Term]:
    return [term for of_adapter in terms.values() for term in of_adapter]


def _check_format(base: nn.Module) -> None:
    weight = base.weight
    assert isinstance(weight, Tensor)
    sizes = getattr(base, "out_features", len(weight)), getattr(base, "in_features", 0)
    if weight.dtype not in MERGEABLE_DTYPES or (weight.shape != sizes and not isinstance(base, nn.Conv2d)):
        raise MergeError(
            f"the base layer, a {type(base).__name__}, keeps its weight as {weight.dtype} of "
            f"shape {tuple(weight.shape)}; only plain weights of 16, 32 or 64 bits can be merged into, so load the "
            "base unquantized"
        )


@contextmanager
def _matrix(base: nn.Module) -> Iterator[Tensor]:
    """The base's weight to be changed in place, a convolution's as a matrix with the kernel in its columns."""
    weight = base.weight
    assert isinstance(weight, Tensor)
    matrix = weight.flatten(1)
    yield matrix
    if matrix.data_ptr() != weight.data_ptr():  # in channels_last there is no such view
        weight.copy_(matrix.view(weight.shape))
