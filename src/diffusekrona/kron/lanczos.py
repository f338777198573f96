"""The largest singular values of a rearranged ΔW with their vectors, by block Lanczos iteration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rearranged import Rearranged

EPSILON = 2.0**-52

_TOLERANCE = 2e-6
"""Share of the least squared error by which an iteration may miss it, so that the error is off by half as much."""

OVERSAMPLING = 7
"""Vectors of a block beyond the wanted ones: what is wanted converges the faster, and eight cost little more than one.

Fewer, 4, let a first look at pure noise overlook up to 1.2 times its residuals; of 7 it was 0.7 times at most.
"""

_SMALL_SIDE = 512
"""R with no more rows or columns has its Gram matrix diagonalised; an iteration would not be faster for certain."""


def leading_triplets(R: Rearranged, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uᵀ, σ and Vᵀ of R's `wanted` largest singular values (of all, if there are fewer), falling."""
    if R.shape[0] > R.shape[1]:
        V, sigma, U = leading_triplets(R.T, wanted)
        return U, sigma, V
    wanted, limit, found = min(wanted, R.shape[0]), R.shape[0] // 3, None
    if R.shape[0] > _SMALL_SIDE:
        R = R.cheapest(products=limit)
        found = block_lanczos(R, wanted, limit)
    if found and found.converged:
        space = found.vectors
    else:
        R = R.cheapest(products=2 * wanted, gram=True)
        space = torch.linalg.eigh(R.gram()).eigenvectors[:, -wanted:].mT
    # RRᵀ has drowned σ < 1e-8 σ₁ in rounding. One more step, with R itself, brings them back.
    V = _orthonormal(R.T.times(space))[0]
    to_V, sigma, U = torch.linalg.svd(R.times(V), full_matrices=False)
    return U, sigma, to_V.mT @ V


class Leading(NamedTuple):
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
        """Whether more steps could not lower the error by a share that matters."""
        return self.missed <= max(_TOLERANCE * (1.0 - self.energy), EPSILON)


def block_lanczos(R: Rearranged, wanted: int, limit: int) -> Leading | None:
    """The leading left singular vectors by block Lanczos iteration on RRᵀ from random vectors, orthogonalised in full.

    A block of at least as many vectors as are wanted finds equal singular values, too, and its convergence does not
    depend on gaps between them (Musco and Musco, Randomized block Krylov methods, 2015). The basis grows to at most
    `limit` vectors; None where they make less than two blocks.
    """
    block = wanted + OVERSAMPLING
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


def _look(known: Tensor, projected: Tensor, coupling: Tensor, wanted: int) -> Leading:
    """What a basis tells that RRᵀ is projected on. An eigenpair's residual is its part in the last block · coupling."""
    values, vectors = torch.linalg.eigh(projected)
    leading = vectors[:, -wanted:].mT
    residuals = torch.linalg.vector_norm(leading[:, -len(coupling) :] @ coupling, dim=1)
    return Leading(leading @ known, float(values[-wanted:].sum()), float(residuals.sum()))
