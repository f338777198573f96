"""R(ΔW), whose rank is the number of Kronecker products of given shapes that make ΔW, without building it.

Van Loan and Pitsianis (Approximation with Kronecker products, 1993) rearrange ΔW, d × h, into R(ΔW), a1·a2 × b1·b2:

    R[(i, j), (k, l)] = ΔW[i·b1 + k, j·b2 + l]

R(A ⊗ B) is the outer product of A's entries and B's. For ΔW = Σ_t A_t ⊗ B_t of other shapes than the wanted: where one
of each side's two splits refines the other, R(A ⊗ B) is R(A) ⊗ R(B) with rows and columns in another order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import FactorShapes


class Rearranged(NamedTuple):
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
    def of(cls, A: Tensor, B: Tensor, shapes: FactorShapes) -> Rearranged:
        """R of ΔW = Σ_t A_t ⊗ B_t for these factor shapes; A is terms × any rows × any columns, and so is B."""
        A, B = _refined(A, B, shapes)
        by_P = math.gcd(shapes.a1, A.shape[1]), math.gcd(shapes.a2, A.shape[2])
        by_Q = shapes.a1 // by_P[0], shapes.a2 // by_P[1]
        (P, rest_P), (Q, rest_Q) = _rearrange(A, *by_P), _rearrange(B, *by_Q)
        return cls(P, Q, by_P + by_Q, rest_P + rest_Q)

    @property
    def T(self) -> Rearranged:
        """Rᵀ, n × m."""
        return Rearranged(self.P.mT, self.Q.mT, self.right, self.left)

    @property
    def shape(self) -> tuple[int, int]:
        """m and n."""
        return math.prod(self.left), math.prod(self.right)

    def dense(self) -> Rearranged:
        """The same matrix as one term, P."""
        P = torch.einsum("tip,tjq->ijpq", self.P, self.Q).reshape(1, *self.shape)
        return Rearranged(P, P.new_ones(1, 1, 1), self.left, self.right)

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

    def cheapest(self, products: int, gram: bool = False) -> Rearranged:
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
