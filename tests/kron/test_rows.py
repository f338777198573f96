"""Rows of A ⊗ B, and A ⊗ B among rows of zeros, against slices of `torch.kron` in float64: bit for bit.

Every entry is a product with ones and zeros, and the terms of the sum come in the same order, so nothing is rounded.
"""

import math
from functools import reduce
from operator import add

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusekrona.kron.rows import among_rows, rows_of, with_b_rows
from diffusekrona.kron.shapes import packed, stacked

many = settings(deadline=None, max_examples=60)
sides = st.integers(1, 8)


@st.composite
def sums(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A and B of one to three terms; of one term as matrices, too."""
    a1, a2, b1, b2 = (draw(sides) for _ in range(4))
    terms = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    A, B = (torch.randn(terms, *size, generator=generator, dtype=torch.float64) for size in ((a1, a2), (b1, b2)))
    return (packed(A), packed(B)) if draw(st.booleans()) else (A, B)


def dense(A: Tensor, B: Tensor) -> Tensor:
    return reduce(add, (torch.kron(a, b) for a, b in zip(stacked(A), stacked(B), strict=True)))


@many
@given(factors=sums(), data=st.data())
def test_any_rows_are_rows_of_the_dense_sum(factors: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    whole, b1 = dense(*factors), stacked(factors[1]).shape[1]
    first = data.draw(st.integers(0, len(whole) - 1))
    last = data.draw(st.integers(first + 1, len(whole)))
    A, B = rows_of(*factors, first, last)
    assert torch.equal(dense(A, B), whole[first:last])
    assert B.shape[1] == math.gcd(b1, first, last)
    assert A.is_contiguous()
    assert B.is_contiguous()


@many
@given(factors=sums(), data=st.data())
def test_equal_parts_take_no_more_terms_than_they_must(factors: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    A, B = map(stacked, factors)
    terms, b1 = len(A), B.shape[1]
    d = A.shape[1] * b1
    parts = data.draw(st.sampled_from([n for n in range(1, d + 1) if d % n == 0]))
    R, n = d // parts, data.draw(st.integers(0, parts - 1))
    found = len(rows_of(A, B, n * R, (n + 1) * R)[0])
    assert found <= terms * b1 // math.gcd(b1, R)
    assert found <= terms * R  # a row is of one B, so no more than one for each
    if R % b1 == 0:
        assert found == terms


def test_rows_within_one_b_are_one_term() -> None:
    A, B = torch.randn(3, 2, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    assert [len(rows_of(A, B, first, first + 4)[0]) for first in (0, 4, 8, 12, 32)] == [1] * 5


@many
@given(factors=sums(), before=st.integers(0, 20), after=st.integers(0, 20))
def test_a_sum_is_put_among_rows_of_zeros(factors: tuple[Tensor, Tensor], before: int, after: int) -> None:
    whole = dense(*factors)
    d = before + len(whole) + after
    A, B = among_rows(*factors, before, d)
    expected = torch.cat([whole.new_zeros(before, whole.shape[1]), whole, whole.new_zeros(after, whole.shape[1])])
    assert torch.equal(dense(A, B), expected)
    assert B.shape[1] == math.gcd(stacked(factors[1]).shape[1], before, d)


@many
@given(factors=sums(), before=st.integers(0, 12), after=st.integers(0, 12))
def test_what_was_put_among_rows_is_found_there(factors: tuple[Tensor, Tensor], before: int, after: int) -> None:
    whole = dense(*factors)
    larger = among_rows(*factors, before, before + len(whole) + after)
    assert torch.equal(dense(*rows_of(*larger, before, before + len(whole))), whole)


@many
@given(factors=sums(), data=st.data())
def test_a_b_of_fewer_rows_gives_the_same_sum(factors: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    A, B = map(stacked, factors)
    g = data.draw(st.sampled_from([n for n in range(1, B.shape[1] + 1) if B.shape[1] % n == 0]))
    smaller = with_b_rows(*factors, g)
    assert torch.equal(dense(*smaller), dense(*factors))
    assert smaller[1].shape == (len(B) * B.shape[1] // g, g, B.shape[2])
    assert smaller[0].shape == (len(smaller[1]), A.shape[1] * B.shape[1] // g, A.shape[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    A, B = torch.ones(2, 3, dtype=dtype), torch.ones(6, 2, dtype=dtype)
    found = [*rows_of(A, B, 4, 8), *among_rows(A, B, 3, 18), *with_b_rows(A, B, 2)]
    assert {tensor.dtype for tensor in found} == {dtype}
