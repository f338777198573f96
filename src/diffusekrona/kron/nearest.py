"""The nearest Σ_r A_r ⊗ B_r of given factor shapes to any ΔW, and the factor shapes that come nearest.

Van Loan and Pitsianis (Approximation with Kronecker products, 1993) rearrange ΔW, d × h, into R(ΔW), a1·a2 × b1·b2:

    R[(i, j), (k, l)] = ΔW[i·b1 + k, j·b2 + l]

R(A ⊗ B) is the outer product of A's entries and B's, so the r nearest terms are the r leading terms of R's SVD.

Every ΔW here is a Σ_t A_t ⊗ B_t of its own shapes: a dense one is ΔW ⊗ [1], a LoRA the sum over its rank of a column
of `up` ⊗ a row of `down`. Where of each side's two splits, d = a1·b1 and the wanted one, one refines the other,
R(A ⊗ B) is R(A) ⊗ R(B) with rows and columns in another order, and R is multiplied by vectors without being built.
All is computed on the CPU in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FactorShapeError, KronAError
from .shapes import FactorShapes, factor_shapes, krona_parameters, legal_factors

TIE = 1e-7
"""Relative errors no further apart than this are equal to `choose_factors`; rounding alone makes up to 5e-8."""

_EPSILON = 2.0**-52

_TOLERANCE = 2e-6
"""Share of the least squared error by which an iteration may miss it, so that the error is off by half as much."""

_OVERSAMPLING = 7
"""Vectors of a block beyond the wanted ones: what is wanted converges the faster, and eight cost little more than one.

Fewer, 4, let a first look at pure noise overlook up to 1.2 times its residuals; of 7 it was 0.7 times at most.
"""

_SMALL_SIDE = 512
"""R with no more rows or columns has its Gram matrix diagonalised; an iteration would not be faster for certain."""

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


class _Rearranged(NamedTuple):
    """R(ΔW) = Σ_t P_t ⊗ Q_t, m × n, with its rows and columns in the order that makes it so.

    Attributes:
        P: terms × m_P × n_P, m_P·m_Q = m.
        Q: terms × m_Q × n_Q, n_P·n_Q = n.
        left: how a row's number divides, into a row and a column of A by P and a row and a column of A by Q.
        right: the same of a column's number and B.
    """

    P: Tensor
    Q: Tensor
    left: tuple[int, ...]
    right: tuple[int, ...]

    @classmethod
    def of(cls, update: _Update, shapes: FactorShapes) -> _Rearranged:
        A, B = _refined(update.A, update.B, shapes)
        by_P = math.gcd(shapes.a1, A.shape[1]), math.gcd(shapes.a2, A.shape[2])
        by_Q = shapes.a1 // by_P[0], shapes.a2 // by_P[1]
        (P, rest_P), (Q, rest_Q) = _rearrange(A, *by_P), _rearrange(B, *by_Q)
        return cls(P, Q, by_P + by_Q, rest_P + rest_Q)

    @property
    def T(self) -> _Rearranged:
        return _Rearranged(self.P.mT, self.Q.mT, self.right, self.left)

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.left), math.prod(self.right)

    def dense(self) -> _Rearranged:
        """The same matrix as one term, P."""
        P = torch.einsum("tip,tjq->ijpq", self.P, self.Q).reshape(1, *self.shape)
        return _Rearranged(P, P.new_ones(1, 1, 1), self.left, self.right)

    def times(self, x: Tensor) -> Tensor:
        """R x for every row x of a k × n tensor, in the cheaper order of the two products; k × m."""
        x = x.unflatten(1, (self.P.shape[2], self.Q.shape[2]))
        p_first, q_first = self._product_costs()
        if p_first <= q_first:
            y = torch.einsum("kitq,tjq->kij", torch.einsum("kpq,tip->kitq", x, self.P), self.Q)
        else:
            y = torch.einsum("kptj,tip->kij", torch.einsum("kpq,tjq->kptj", x, self.Q), self.P)
        return y.reshape(len(x), -1)

    def _product_costs(self) -> tuple[int, int]:
        """Multiply-adds of R x for one x: with P first, with Q first."""
        terms, p, q = len(self.P), self.P[0].numel(), self.Q[0].numel()
        return (
            terms * (p * self.Q.shape[2] + q * self.P.shape[1]),
            terms * (q * self.P.shape[2] + p * self.Q.shape[1]),
        )

    def gram(self) -> Tensor:
        """RRᵀ = Σ_t Σ_u P_u P_tᵀ ⊗ Q_u Q_tᵀ, m × m."""
        m_P, m_Q = self.P.shape[1], self.Q.shape[1]
        G = self.P.new_zeros(m_P * m_P, m_Q * m_Q)
        for P_t, Q_t in zip(self.P, self.Q, strict=True):
            G.addmm_((self.P @ P_t.mT).flatten(1).mT, (self.Q @ Q_t.mT).flatten(1))
        return G.view(m_P, m_P, m_Q, m_Q).transpose(1, 2).reshape(m_P * m_Q, m_P * m_Q)

    def cheapest(self, products: int, gram: bool = False) -> _Rearranged:
        """Itself or, where that takes fewer multiply-adds, its `dense()`, for so many products R x and perhaps RRᵀ."""
        terms, p, q, (m, n) = len(self.P), self.P[0].numel(), self.Q[0].numel(), self.shape
        if terms == 1 and 1 in (p, q):
            return self
        own, dense = products * min(self._product_costs()), (terms + products) * m * n
        if gram:
            own, dense = own + terms**2 * (self.P.shape[1] * p + self.Q.shape[1] * q + m * m), dense + m * m * n
        return self if own <= dense else self.dense()


def _rearrange(M: Tensor, a1: int, a2: int) -> tuple[Tensor, tuple[int, int]]:
    """R(M_t) for each of the terms, terms × a1·a2 × b1·b2, and (b1, b2)."""
    b1, b2 = M.shape[1] // a1, M.shape[2] // a2
    split = M.reshape(-1, a1, b1, a2, b2).transpose(2, 3)
    return split.reshape(-1, a1 * a2, b1 * b2), (b1, b2)


def _refined(A: Tensor, B: Tensor, shapes: FactorShapes) -> tuple[Tensor, Tensor]:
    """ΔW's factors such that for rows and for columns, A's number of them divides the wanted one or is divided by it.

    Where it is neither, A is cut into parts of the greatest common divisor's size, which makes more terms and larger
    B_t, or ΔW is built where that takes no more memory.
    """
    rows, columns = _parts(A.shape[1], shapes.a1), _parts(A.shape[2], shapes.a2)
    if rows == columns == 1:
        return A, B
    if len(A) * (rows * columns) ** 2 * B[0].numel() >= shapes.d * shapes.h:
        dense = torch.einsum("tij,tkl->ikjl", A, B).reshape(1, shapes.d, shapes.h)
        return dense, B.new_ones(1, 1, 1)
    A, B = _cut_rows(A, B, rows)
    A, B = _cut_rows(A.mT, B.mT, columns)
    return A.mT, B.mT


def _parts(found: int, wanted: int) -> int:
    return 1 if wanted % found == 0 or found % wanted == 0 else found // math.gcd(found, wanted)


def _cut_rows(A: Tensor, B: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Σ_t A_t ⊗ B_t = Σ_t Σ_p A_tp ⊗ (e_p ⊗ B_t), A_tp being every `parts`-th row of A_t from row p on."""
    cut = A.unflatten(1, (-1, parts)).transpose(1, 2).flatten(0, 1)
    units = torch.eye(parts, dtype=B.dtype)
    return cut, torch.einsum("pr,tkl->tprkl", units, B).flatten(2, 3).flatten(0, 1)


def _nearest(update: _Update, shapes: FactorShapes, num_terms: int) -> tuple[Tensor, Tensor, float]:
    """A, B, both in float64, and the relative error."""
    A = torch.zeros(num_terms, shapes.a1, shapes.a2, dtype=torch.float64)
    B = torch.zeros(num_terms, shapes.b1, shapes.b2, dtype=torch.float64)
    if not update.norm:
        return A, B, 0.0
    R = _Rearranged.of(update, shapes)
    U, sigma, V = _leading_triplets(R, num_terms)
    present = sigma > max(R.shape) * _EPSILON * sigma[0]
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


def _leading_triplets(R: _Rearranged, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uᵀ, σ and Vᵀ of R's `wanted` largest singular values (of all, if there are fewer), falling."""
    if R.shape[0] > R.shape[1]:
        V, sigma, U = _leading_triplets(R.T, wanted)
        return U, sigma, V
    wanted, limit, found = min(wanted, R.shape[0]), R.shape[0] // 3, None
    if R.shape[0] > _SMALL_SIDE:
        R = R.cheapest(products=limit)
        found = _block_lanczos(R, wanted, limit)
    if found and found.converged:
        space = found.vectors
    else:
        R = R.cheapest(products=2 * wanted, gram=True)
        space = torch.linalg.eigh(R.gram()).eigenvectors[:, -wanted:].mT
    # RRᵀ has drowned σ < 1e-8 σ₁ in rounding. One more step, with R itself, brings them back.
    V = _orthonormal(R.T.times(space))[0]
    to_V, sigma, U = torch.linalg.svd(R.times(V), full_matrices=False)
    return U, sigma, to_V.mT @ V


class _Leading(NamedTuple):
    """What an iteration knows of R's largest singular values, if ‖R‖ = 1.

    Attributes:
        vectors: wanted × m, orthonormal, spanning about the left singular vectors' space.
        energy: ‖vectors · R‖², at most the wanted's Σ σ².
        missed: estimate of the most that Σ σ² may have beyond that.
    """

    vectors: Tensor
    energy: float
    missed: float

    @property
    def converged(self) -> bool:
        return self.missed <= max(_TOLERANCE * (1.0 - self.energy), _EPSILON)


def _block_lanczos(R: _Rearranged, wanted: int, limit: int) -> _Leading | None:
    """The leading left singular vectors by block Lanczos iteration on RRᵀ from random vectors, orthogonalised in full.

    A block of at least as many vectors as are wanted finds equal singular values, too, and its convergence does not
    depend on gaps between them (Musco and Musco, Randomized block Krylov methods, 2015). The basis grows to at most
    `limit` vectors; None where they make less than two blocks.
    """
    block = wanted + _OVERSAMPLING
    if limit < 2 * block:
        return None
    m = R.shape[0]
    basis, projected = R.P.new_empty(limit, m), R.P.new_zeros(limit, limit)
    noise = torch.randn(block, m, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    new, looked_at = _orthonormal(noise)[0], 0
    for stop in range(block, limit + 1, block):
        basis[stop - block : stop] = new
        known = basis[:stop]
        image = R.times(R.T.times(new))
        projected[stop - block : stop, :stop] = image @ known.mT
        new, coupling = _orthonormal_rest(image, known)
        # A look costs the cube of the basis, so the next one waits until that has grown by a quarter.
        if stop >= 1.25 * looked_at or stop + block > limit:
            looked_at, found = stop, _look(known, projected[:stop, :stop], coupling, wanted)
            if found.converged:
                break
    return found


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q and the S of rows = S Q."""
    Q, S = torch.linalg.qr(rows.mT)
    return Q.mT, S.mT


def _orthonormal_rest(image: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q and the S with image = S Q + what lies in `known`; made twice, for rounding's sake."""
    first, outer = _orthonormal(image - (image @ known.mT) @ known)
    second, inner = _orthonormal(first - (first @ known.mT) @ known)
    return second, outer @ inner


def _look(known: Tensor, projected: Tensor, coupling: Tensor, wanted: int) -> _Leading:
    """What a basis tells that RRᵀ is projected on. An eigenpair's residual is its part in the last block · coupling."""
    values, vectors = torch.linalg.eigh(projected)
    leading = vectors[:, -wanted:].mT
    residuals = torch.linalg.vector_norm(leading[:, -len(coupling) :] @ coupling, dim=1)
    return _Leading(leading @ known, float(values[-wanted:].sum()), float(residuals.sum()))


def _error_range(update: _Update, shapes: FactorShapes, num_terms: int) -> tuple[float, float]:
    """The least and the greatest that the relative error may be, from a first look at R."""
    if update.norm:
        R = _Rearranged.of(update, shapes)
        R = R.T if R.shape[0] > R.shape[1] else R
        limit = _FIRST_LOOK * (num_terms + _OVERSAMPLING)
        look = _block_lanczos(R.cheapest(2 * limit), num_terms, limit) if 2 * limit <= R.shape[0] else None
        if look:
            return _error_without(look.energy + 2 * look.missed), _error_without(look.energy)
    error = _nearest(update, shapes, num_terms)[2]
    return error, error
