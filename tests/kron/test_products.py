"""(A ⊗ B)x against `x @ torch.kron(A, B).T` in float64: values, every gradient, layouts, dtypes, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusekrona import kron_linear
from diffusekrona.kron.costs import krona_multiply_adds
from diffusekrona.kron.products import KronRows, dense_update, kron_linear_a_first, kron_linear_b_first
from diffusekrona.kron.shapes import FactorShapes, Layout
from tests.tensors import (
    LargestTensor,
    assert_all_close,
    assert_only_wanted_gradients,
    laid_out,
    layouts,
    leading,
    outputs_and_gradients,
    random_inputs,
    shapes_of_factors,
)

PRODUCTS = [kron_linear, kron_linear_a_first, kron_linear_b_first]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

every_product = pytest.mark.parametrize("product", PRODUCTS)
many = settings(deadline=None, max_examples=80)


def reference(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    # torch.kron itself refuses some layouts.
    return x @ torch.kron(A.contiguous(), B.contiguous()).T


@every_product
@many
@given(
    shapes=shapes_of_factors,
    lead=leading,
    layout=st.tuples(layouts, layouts, layouts),
    seed=st.integers(0, 2**31),
)
def test_value_and_every_gradient_equal_the_dense_product_in_any_layout(product, shapes, lead, layout, seed):
    inputs, output_gradient = random_inputs(shapes, lead, seed)
    found = outputs_and_gradients(laid_out(product, layout), inputs, output_gradient)
    expected = outputs_and_gradients(laid_out(reference, layout), inputs, output_gradient)
    assert found[0].shape == (*lead, shapes.d)
    assert_all_close(found, expected)


@every_product
@many
@given(shapes=shapes_of_factors, lead=leading, seed=st.integers(0, 2**31))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_stays_within_the_bound_of_the_dtype(product, dtype, shapes, lead, seed):
    inputs, output_gradient = random_inputs(shapes, lead, seed, dtype)
    found = outputs_and_gradients(product, inputs, output_gradient)
    exact = outputs_and_gradients(reference, [t.double() for t in inputs], output_gradient.double())
    # All four are sums of products, so with absolute values they bound what rounding each term can do.
    largest = outputs_and_gradients(reference, [t.double().abs() for t in inputs], output_gradient.double().abs())
    tokens = max(1, output_gradient.numel() // shapes.d)
    # A sum of n terms has a relative error of at most n roundings; each term here passes through two sums.
    steps = sum(shapes) + tokens * max(shapes) + 4
    for ours, theirs, bound in zip(found, exact, largest, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - theirs).abs()
        assert bool((error <= steps * (torch.finfo(dtype).eps * bound + torch.finfo(dtype).tiny)).all())


@every_product
def test_gradients_pass_gradcheck_twice(product):
    inputs, _ = random_inputs(FactorShapes(2, 3, 3, 2), (2,), seed=0)
    leaves = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(product, leaves)
    assert torch.autograd.gradgradcheck(product, leaves)


@every_product
@pytest.mark.parametrize("wanted", [(i & 1, i & 2, i & 4) for i in range(8)])
def test_only_the_inputs_that_ask_for_a_gradient_get_one(product, wanted):
    inputs, output_gradient = random_inputs(FactorShapes(2, 3, 5, 2), (4,), seed=1)
    expected = outputs_and_gradients(reference, inputs, output_gradient)[1:]
    assert_only_wanted_gradients(product, inputs, output_gradient, wanted, expected)


@every_product
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_leaves_dtypes(product, x_dtype, factor_dtype):
    shapes = FactorShapes(4, 3, 2, 5)
    (x, A, B), output_gradient = random_inputs(shapes, (6,), seed=2)
    leaves = [t.to(d).requires_grad_() for t, d in ((x, x_dtype), (A, factor_dtype), (B, factor_dtype))]
    with torch.autocast("cpu", torch.bfloat16):
        y = product(*leaves)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, leaves, output_gradient.bfloat16())
    expected = outputs_and_gradients(reference, [x, A, B], output_gradient)
    for ours, theirs, leaf in zip((y, *gradients), expected, (y, *leaves), strict=True):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))


@many
@given(shapes=shapes_of_factors)
def test_kron_linear_does_only_the_multiply_adds_of_the_cheaper_order(shapes):
    (x, A, B), _ = random_inputs(shapes, (3,), seed=3)
    with FlopCounterMode(display=False) as counter:
        kron_linear(x, A, B)
    costs = [krona_multiply_adds(shapes, order, tokens=3) for order in ("A first", "B first")]
    assert counter.get_total_flops() == 2 * min(costs)


def test_the_paper_s_index_formula_holds_entry_by_entry():
    shapes = FactorShapes(2, 3, 4, 5)
    (x, A, B), _ = random_inputs(shapes, (), seed=4)
    y = kron_linear(x, A, B)
    for i in range(shapes.a1):
        for k in range(shapes.b1):
            terms = [A[i, j] * B[k, m] * x[j * shapes.b2 + m] for j in range(shapes.a2) for m in range(shapes.b2)]
            torch.testing.assert_close(y[i * shapes.b1 + k], sum(terms))


@pytest.mark.parametrize(
    ("x_size", "A_size", "B_size", "text"),
    [
        (
            (4, 7),
            (2, 3),
            (5, 2),
            r"x has shape \(4, 7\), but A \(2 × 3\) and B \(5 × 2\) take 3·2 = 6 features",
        ),
        ((), (1, 1), (1, 1), r"x has shape \(\).* 1·1 = 1 features"),
        ((4, 6), (6,), (5, 2), r"A and B must be matrices, got shapes \(6,\) and \(5, 2\)"),
        ((4, 6), (2, 3), (1, 5, 2), r"A and B must be matrices, got shapes \(2, 3\) and \(1, 5, 2\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_both_sizes(x_size, A_size, B_size, text):
    with pytest.raises(ValueError, match=text):
        kron_linear(torch.zeros(x_size), torch.zeros(A_size), torch.zeros(B_size))


def written(rows: KronRows, start: int, stop: int, dense: Tensor) -> Tensor:
    return rows.write(start, stop, dense.new_full((stop - start, dense.shape[1]), torch.nan))


@many
@given(
    shapes=shapes_of_factors,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    layout=st.tuples(layouts, layouts),
    step=st.integers(1, 130),
    memory=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows_of_the_product_have_torch_krons_bits_in_any_chunking(shapes, dtype, layout, step, memory, seed):
    (_, A, B), _ = random_inputs(shapes, (), seed, dtype)
    A, B = layout[0](A), layout[1](B)
    dense = torch.kron(A.contiguous(), B.contiguous())
    rows = KronRows(A, B, torch.full((step * shapes.h,), torch.nan, dtype=dtype) if memory else None)
    chunks = [written(rows, i, min(i + step, shapes.d), dense) for i in range(0, shapes.d, step)]
    bits = INTEGERS[dense.element_size()]
    assert torch.equal(torch.cat(chunks).view(bits), dense.contiguous().view(bits))


@many
@given(shapes=shapes_of_factors, data=st.data())
def test_any_range_of_rows_is_that_range_of_the_product(shapes, data):
    (_, A, B), _ = random_inputs(shapes, (), seed=5)
    rows, dense = KronRows(A, B), torch.kron(A, B)
    for _ in range(3):
        start, stop = sorted(data.draw(st.tuples(st.integers(0, shapes.d), st.integers(0, shapes.d))))
        assert torch.equal(written(rows, start, stop, dense), dense[start:stop])


@every_product
@pytest.mark.parametrize("shapes", [FactorShapes(8, 8, 8, 8), FactorShapes(4, 16, 16, 4), FactorShapes(16, 2, 4, 32)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_neither_direction_ever_builds_the_dense_product(product, shapes, lead):
    inputs, output_gradient = random_inputs(shapes, lead, seed=6)
    with LargestTensor() as largest:
        outputs_and_gradients(product, inputs, output_gradient)
    assert 0 < largest.elements < shapes.d * shapes.h
    with LargestTensor() as dense:
        outputs_and_gradients(reference, inputs, output_gradient)
    assert dense.elements >= shapes.d * shapes.h


@pytest.mark.parametrize("layout", ["kron", "transposed"])
def test_a_dense_update_takes_factors_of_one_row_or_column_however_they_lie_in_memory(layout: Layout) -> None:
    """torch.kron raises for some of them."""
    makes = [(torch.randn(1, n) if turned else torch.randn(n, 1)) for n in (1, 5) for turned in (False, True)]
    factors = [f for made in makes for f in (made, made.T)] + [torch.randn(3, 4), torch.randn(3, 4).T]
    for A in factors:
        for B in factors:
            expected = torch.kron(torch.empty(A.shape).copy_(A), torch.empty(B.shape).copy_(B))
            if layout == "transposed":
                expected = expected.view(len(A), len(B), -1).transpose(0, 1).reshape(len(expected), -1)
            assert torch.equal(dense_update([(A, B)], layout), expected)
