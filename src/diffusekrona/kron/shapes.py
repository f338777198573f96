"""Integer arithmetic of adapters: legal factor shapes, parameter counts and rank bounds.

Notation, as everywhere in this library: a linear layer's weight is d × h (d outputs, h inputs). KronA's update is
A ⊗ B with A of a1 × a2 and B of b1 × b2, a1·b1 = d and a2·b2 = h (paper, Table 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..errors import FactorShapeError

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["kron", "transposed"]


class FactorShapes(NamedTuple):
    """The shapes of both factors of one layer: A is a1 × a2, B is b1 × b2."""

    a1: int
    a2: int
    b1: int
    b2: int

    @property
    def d(self) -> int:
        """Output features, a1·b1."""
        return self.a1 * self.b1

    @property
    def h(self) -> int:
        """Input features, a2·b2."""
        return self.a2 * self.b2


@dataclass(frozen=True)
class UpdateShapes:
    """What one adapter trains in one layer, whose update is a sum of terms A ⊗ B.

    Attributes:
        factors: of every term.
        num_terms: how many terms.
        b_rank: ρ where B is a product B1·B2 of b1 × ρ and ρ × b2, as in LoKr; None where it is whole.
        kernel: height and width of a convolution, which B's columns carry; () for a linear layer.
    """

    factors: FactorShapes
    num_terms: int = 1
    b_rank: int | None = None
    kernel: tuple[int, ...] = ()

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """A, and either B or B1 and B2, each with its size; with the terms in front where there are several."""
        a1, a2, b1, _ = self.factors
        terms = (self.num_terms,) if self.num_terms > 1 else ()
        a = {"A": (*terms, a1, a2)}
        if self.b_rank is None:
            return a | {"B": (*terms, b1, self.b_columns)}
        return a | {"B1": (*terms, b1, self.b_rank), "B2": (*terms, self.b_rank, self.b_columns)}

    @property
    def b_columns(self) -> int:
        """Columns of B: b2, for a convolution times the size of its kernel."""
        return self.factors.b2 * math.prod(self.kernel)

    @property
    def parameters(self) -> int:
        """Trainable parameters: a1·a2 + b1·b2 for one term with a whole B (paper, Table 1)."""
        return sum(map(math.prod, self.tensors.values()))

    @property
    def highest_rank(self) -> int:
        """The rank that the update, a convolution's as a d × h·kernel matrix, can reach (paper, Theorem E.2)."""
        a1, a2, b1, _ = self.factors
        of_b = min(b1, self.b_columns, self.b_rank or b1)
        return min(self.num_terms * min(a1, a2) * of_b, a1 * b1, a2 * self.b_columns)


def terms_of(A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(A_r, B_r) of each term of Σ A_r ⊗ B_r.

    Args:
        A: a1 × a2 of the only term, or terms × a1 × a2.
        B: b1 × b2, or terms × b1 × b2.
    """
    # A single factor stays itself: taking it out of a stack would copy its gradient.
    return [(A, B)] if A.dim() == 2 else list(zip(A.unbind(), B.unbind(), strict=True))


def stacked(factors: Tensor) -> Tensor:
    """The factors of all terms, terms × rows × columns, also where there is just one, whose factor is a matrix."""
    return factors if factors.dim() == 3 else factors.unsqueeze(0)


def packed(factors: Tensor) -> Tensor:
    """The opposite of `stacked`: a matrix for just one term."""
    return factors[0] if len(factors) == 1 else factors


def update_shapes(
    factors: FactorShapes, num_terms: int = 1, b_rank: int | None = None, kernel: tuple[int, ...] = ()
) -> UpdateShapes:
    """What an adapter of these settings trains in a layer. B is a product where that has fewer parameters."""
    whole = UpdateShapes(factors, num_terms, None, kernel)
    if b_rank is None or b_rank * (factors.b1 + whole.b_columns) >= factors.b1 * whole.b_columns:
        return whole
    return UpdateShapes(factors, num_terms, b_rank, kernel)


def divisors(n: int) -> list[int]:
    """Every divisor of `n` ≥ 1, ascending."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return small + [n // i for i in reversed(small) if i * i != n]


def nearest_divisors(n: int, wanted: int) -> list[int]:
    """The divisor of `n` that is `wanted`, or the nearest below and above it (one of them at the ends)."""
    found = divisors(n)
    if wanted in found:
        return [wanted]
    below = [i for i in found if i < wanted]
    above = [i for i in found if i > wanted]
    return below[-1:] + above[:1]


def legal_factors(d: int, h: int) -> list[tuple[int, int]]:
    """Every (a1, a2) that a d × h layer can take, ascending."""
    return [(a1, a2) for a1 in divisors(d) for a2 in divisors(h)]


def nearest_factors(d: int, h: int, a1: int, a2: int) -> tuple[int, int]:
    """The legal (a1, a2) whose entries are nearest to the ones asked for, as ratios."""
    return _nearest(d, a1), _nearest(h, a2)


def _nearest(n: int, wanted: int) -> int:
    return min(nearest_divisors(n, wanted), key=lambda i: max(i, wanted) / min(i, wanted))


def factor_shapes(d: int, h: int, a1: int, a2: int) -> FactorShapes:
    """Shapes of A and B for a d × h layer.

    Raises:
        FactorShapeError: a1 does not divide d or a2 does not divide h; the text names the divisors on either side.
    """
    problems = [
        f"{name}={wanted} does not divide its {n} {side} features (nearest divisors: "
        + " and ".join(map(str, nearest_divisors(n, wanted)))
        + ")"
        for name, wanted, n, side in (("a1", a1, d, "output"), ("a2", a2, h, "input"))
        if n % wanted
    ]
    if problems:
        near = nearest_factors(d, h, a1, a2)
        raise FactorShapeError(f"{' and '.join(problems)}; the nearest factors that fit are {near}")
    return FactorShapes(a1, a2, d // a1, h // a2)


def lokr_shapes(d: int, h: int, factor: int = -1) -> FactorShapes:
    """Shapes of LoKr's w1 (a1 × a2) and w2 (b1 × b2), as PEFT splits them: one `factor` for both sides.

    A positive `factor` that divides a side n becomes w1's part of it. Otherwise w1's part is the largest divisor of n
    that is at most √n and, for a positive factor, at most `factor`; -1 sets no limit.
    """
    a1, b1 = _lokr_split(d, factor)
    a2, b2 = _lokr_split(h, factor)
    return FactorShapes(a1, a2, b1, b2)


def _lokr_split(n: int, factor: int) -> tuple[int, int]:
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = math.isqrt(n) if factor < 0 else min(factor, math.isqrt(n))
    small = max(i for i in divisors(n) if i <= limit)
    return small, n // small


def krona_parameters(d: int, h: int, a1: int, a2: int) -> int:
    """Trainable parameters of KronA: a1·a2 + b1·b2 (paper, Table 1)."""
    return UpdateShapes(factor_shapes(d, h, a1, a2)).parameters


def fewest_parameters(d: int, h: int) -> int:
    """Trainable parameters of KronA with the factors that have the fewest."""
    return min(krona_parameters(d, h, a1, a2) for a1, a2 in legal_factors(d, h))


def lora_parameters(d: int, h: int, r: int) -> int:
    """Trainable parameters of LoRA: r(d + h) (paper, Table 1)."""
    return r * (d + h)


def lokr_parameters(d: int, h: int, r: int | None = None, factor: int = -1) -> int:
    """Trainable parameters of LoKr. w2 is kept whole for `r=None` and wherever r is at least half its longer side."""
    w = lokr_shapes(d, h, factor)
    w2 = w.b1 * w.b2 if lokr_keeps_w2(w, r) else lora_parameters(w.b1, w.b2, r or 0)
    return w.a1 * w.a2 + w2


def lokr_keeps_w2(w: FactorShapes, r: int | None) -> bool:
    """Whether LoKr of rank r keeps w2 whole, as a product of two would not be smaller by half."""
    return r is None or 2 * r >= max(w.b1, w.b2)


def loha_parameters(d: int, h: int, r: int) -> int:
    """Trainable parameters of LoHa, the Hadamard product of two rank-r products: 2r(d + h)."""
    return 2 * r * (d + h)


def krona_rank(d: int, h: int, a1: int, a2: int) -> int:
    """Highest rank of A ⊗ B: min(a1, a2)·min(b1, b2) (paper, Theorem E.2)."""
    return UpdateShapes(factor_shapes(d, h, a1, a2)).highest_rank
