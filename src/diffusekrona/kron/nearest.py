"""The nearest Σ_r A_r ⊗ B_r of given factor shapes to any ΔW, and the factor shapes that come nearest.

The r nearest terms are the r leading terms of the singular value decomposition of R(ΔW), which `rearranged` multiplies
by vectors without building it. Every ΔW here is a Σ_t A_t ⊗ B_t of its own shapes: a dense one is ΔW ⊗ [1], a LoRA the
sum over its rank of a column of `up` ⊗ a row of `down`. All is computed on the CPU in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FactorShapeError, KronAError
from .lanczos import EPSILON, OVERSAMPLING, block_lanczos, leading_triplets
from .rearranged import Rearranged
from .shapes import FactorShapes, factor_shapes, krona_parameters, legal_factors

TIE = 1e-7
"""Relative errors no further apart than this are equal to `choose_factors`; rounding alone makes up to 5e-8."""

_FIRST_LOOK = 5
"""Steps of the iteration by which `choose_factors` first judges factors."""


@dataclass(frozen=True)
class LowRank:
    """ΔW = up @ down, a LoRA with its scale in either.

    Attributes:
        up: d × r.
        down: r × h.
    """

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Kronecker:
    """ΔW = Σ_t A_t ⊗ B_t, a KronA adapter with its scale in either.

    Attributes:
        A: terms × a1 × a2.
        B: terms × b1 × b2.
    """

    A: Tensor
    B: Tensor


Delta = Tensor | LowRank | Kronecker


@dataclass(frozen=True)
class Approximation:
    """Σ_r A_r ⊗ B_r, nearest to a ΔW in the Frobenius norm.

    Attributes:
        A: num_terms × a1 × a2, float32.
        B: num_terms × b1 × b2, float32.
        error: ‖ΔW − Σ_r A_r ⊗ B_r‖ / ‖ΔW‖ before A and B are rounded to float32, 0 where ΔW is; up to 5e-8 where it
            should be 0.
        norm: ‖ΔW‖, so that Σ (error·norm)² / Σ norm² is the squared error of several layers.
    """

    A: Tensor
    B: Tensor
    error: float
    norm: float


def nearest_kronecker(delta: Delta, a1: int, a2: int, num_terms: int = 1) -> Approximation:
    """The Σ_r A_r ⊗ B_r nearest to ΔW in the Frobenius norm, A_r of a1 × a2.

    The terms are orthogonal to each other and fall in norm. A_r and B_r have the same norm; A_r's entry of largest
    magnitude is positive. Terms beyond R's rank are zeros.

    Args:
        delta: ΔW, a d × h tensor of any floating dtype, a `LowRank` or a `Kronecker`. It is not changed.
        a1: rows of A, a divisor of d.
        a2: columns of A, a divisor of h.
        num_terms: how many terms to return.

    Raises:
        FactorShapeError: a1 does not divide d, a2 does not divide h, or delta's tensors do not make a matrix.
        KronAError: delta is not finite, or num_terms is less than 1.
    """
    _check_positive(num_terms=num_terms)
    if min(a1, a2) < 1:
        raise FactorShapeError(f"a1 and a2 must be at least 1, got {a1} and {a2}.")
    update = _Update.of(delta)
    shapes = factor_shapes(*update.size, a1, a2)
    A, B, error = _nearest(update, shapes, num_terms)
    device = _tensors(delta)[0].device
    return Approximation(A.to(device, torch.float32), B.to(device, torch.float32), error, update.norm)


def total_error(fits: Collection[Approximation]) -> float:
    """‖ΔW − Σ_r A_r ⊗ B_r‖ / ‖ΔW‖ over several layers together; 0 over none."""
    missed = math.fsum((fit.error * fit.norm) ** 2 for fit in fits)
    whole = math.fsum(fit.norm**2 for fit in fits)
    return math.sqrt(missed / whole) if whole else 0.0


def choose_factors(delta: Delta, budget: int, num_terms: int = 1) -> tuple[int, int]:
    """The (a1, a2) whose nearest Σ_r A_r ⊗ B_r of at most `budget` parameters has the smallest error.

    All legal factors within the budget are looked at: a few steps of a block Lanczos iteration tell the energy
    Σ σ² that a candidate's terms have at least, and twice its residuals how much they may have in addition. Only
    candidates that may still reach the smallest error so far ensured are solved. The addition is an estimate, not a
    bound: it could leave out the best of factors that are all but equally good, not a term that stands out of ΔW.

    Errors within `TIE` of the smallest are ties; they go to the fewest parameters, then to the smallest a1.

    Raises:
        FactorShapeError: no legal factors are within the budget, or delta's tensors do not make a matrix.
        KronAError: delta is not finite, or num_terms is less than 1.
    """
    _check_positive(num_terms=num_terms)
    update = _Update.of(delta)
    d, h = update.size
    costs = {(a1, a2): num_terms * krona_parameters(d, h, a1, a2) for a1, a2 in legal_factors(d, h)}
    least = min(costs.values())
    if least > budget:
        raise FactorShapeError(
            f"no factors of a {d} × {h} layer have {budget} parameters or fewer; the smallest take {least} "
            f"({num_terms} × A and B)."
        )
    affordable = sorted((f for f, cost in costs.items() if cost <= budget), key=lambda f: (costs[f], f))
    ranges = {f: _error_range(update, factor_shapes(d, h, *f), num_terms) for f in affordable}
    ensured = min(high for _, high in ranges.values()) + TIE
    hopeful = [f for f, (low, _) in ranges.items() if low <= ensured]
    if len(hopeful) == 1:
        return hopeful[0]
    errors = {f: _nearest(update, factor_shapes(d, h, *f), num_terms)[2] for f in hopeful}
    return next(f for f, error in errors.items() if error <= min(errors.values()) + TIE)


def _check_positive(num_terms: int) -> None:
    if num_terms < 1:
        raise KronAError(f"num_terms must be at least 1, got {num_terms}.")


class _Update(NamedTuple):
    """ΔW / ‖ΔW‖ = Σ_t A_t ⊗ B_t in float64 (without meaning where ΔW is zero), and ‖ΔW‖."""

    A: Tensor
    B: Tensor
    norm: float

    @property
    def size(self) -> tuple[int, int]:
        return self.A.shape[1] * self.B.shape[1], self.A.shape[2] * self.B.shape[2]

    @classmethod
    def of(cls, delta: Delta) -> _Update:
        A, B = (t.detach().to("cpu", torch.float64) for t in _factors(delta))
        A_is_smaller = A.numel() <= B.numel()
        P, Q = _orthonormal_terms(A, B) if A_is_smaller else _orthonormal_terms(B, A)
        # ‖ΔW‖ = ‖Q‖, a sum of squares, in which terms that cancel each other have already done so without loss.
        norm = float(torch.linalg.vector_norm(Q))
        if not math.isfinite(norm):
            raise KronAError("ΔW is not finite, so no Kronecker product is nearest to it.")
        Q = Q / norm
        return cls(P, Q, norm) if A_is_smaller else cls(Q, P, norm)


def _factors(delta: Delta) -> tuple[Tensor, Tensor]:
    """ΔW as a Kronecker product's factors, terms first."""
    given, dims = _tensors(delta), 3 if isinstance(delta, Kronecker) else 2
    if all(t.dim() == dims and t.numel() for t in given):
        if isinstance(delta, Tensor):
            A, B = delta.unsqueeze(0), delta.new_ones(1, 1, 1)
        elif isinstance(delta, LowRank):
            A, B = delta.up.mT.unsqueeze(-1), delta.down.unsqueeze(-2)
        else:
            A, B = delta.A, delta.B
        if len(A) == len(B):
            return A, B
    raise FactorShapeError(
        "ΔW must be d × h, (d × r, r × h) or (terms × a1 × a2, terms × b1 × b2), with no side of 0; got "
        + " and ".join(str(tuple(t.shape)) for t in given)
        + "."
    )


def _tensors(delta: Delta) -> tuple[Tensor, ...]:
    if isinstance(delta, Tensor):
        return (delta,)
    return (delta.up, delta.down) if isinstance(delta, LowRank) else (delta.A, delta.B)


def _orthonormal_terms(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t P_t ⊗ Q_t with other terms, no more than before, whose P_t are orthonormal as vectors."""
    vectors, weights = torch.linalg.qr(P.flatten(1).mT)
    return vectors.mT.unflatten(1, P.shape[1:]), torch.tensordot(weights, Q, 1)


def _nearest(update: _Update, shapes: FactorShapes, num_terms: int) -> tuple[Tensor, Tensor, float]:
    """A, B, both in float64, and the relative error."""
    A = torch.zeros(num_terms, shapes.a1, shapes.a2, dtype=torch.float64)
    B = torch.zeros(num_terms, shapes.b1, shapes.b2, dtype=torch.float64)
    if not update.norm:
        return A, B, 0.0
    R = Rearranged.of(update.A, update.B, shapes)
    U, sigma, V = leading_triplets(R, num_terms)
    present = sigma > max(R.shape) * EPSILON * sigma[0]
    scale = (update.norm * sigma * present).sqrt().unsqueeze(1)
    scale = scale * U.gather(1, U.abs().argmax(1, keepdim=True)).sign()
    A[: len(U)] = _matrices(scale * U, R.left)
    B[: len(V)] = _matrices(scale * V, R.right)
    return A, B, _error_without(float(sigma.square().sum()))


def _error_without(energy: float) -> float:
    """Relative error of terms with this share Σ σ² of ‖ΔW‖². Cancellation costs it 1e-16, and the root of it 1e-8."""
    return math.sqrt(max(0.0, 1.0 - energy))


def _matrices(vectors: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Every row of `vectors` as an A, or a B, from R's order of rows, or columns."""
    P_rows, P_columns, Q_rows, Q_columns = sides
    split = vectors.reshape(-1, *sides).transpose(2, 3)
    return split.reshape(-1, P_rows * Q_rows, P_columns * Q_columns)


def _error_range(update: _Update, shapes: FactorShapes, num_terms: int) -> tuple[float, float]:
    """The least and the greatest that the relative error may be, from a first look at R."""
    if update.norm:
        R = Rearranged.of(update.A, update.B, shapes)
        R = R.T if R.shape[0] > R.shape[1] else R
        limit = _FIRST_LOOK * (num_terms + OVERSAMPLING)
        look = block_lanczos(R.cheapest(2 * limit), num_terms, limit) if 2 * limit <= R.shape[0] else None
        if look:
            return _error_without(look.energy + 2 * look.missed), _error_without(look.energy)
    error = _nearest(update, shapes, num_terms)[2]
    return error, error
