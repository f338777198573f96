"""Shapes, counts and ranks against brute force, real tensors, and PEFT's own modules."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from diffusekrona.errors import FactorShapeError
from diffusekrona.kron import shapes as factors
from diffusekrona.kron.shapes import FactorShapes, factor_shapes

quick = settings(deadline=None, max_examples=100)


few = settings(deadline=None, max_examples=40)


sizes = st.integers(1, 60)


lokr_factors = st.one_of(st.just(-1), st.integers(1, 60))


@st.composite
def legal_layers(draw: st.DrawFn, largest: int = 6) -> FactorShapes:
    return FactorShapes(*(draw(st.integers(1, largest)) for _ in range(4)))


def adapted_by_peft(config: PeftConfig, d: int, h: int, device: str = "meta") -> nn.Module:
    model = nn.Sequential(nn.Linear(h, d, bias=False, device=device))
    return inject_adapter_in_model(config, model)


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def generic(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.double()))


@quick
@given(n=st.integers(1, 3000))
def test_divisors_are_the_numbers_that_divide_in_ascending_order(n):
    assert factors.divisors(n) == [i for i in range(1, n + 1) if n % i == 0]


@quick
@given(d=sizes, h=sizes)
def test_legal_factors_are_the_pairs_of_divisors_of_both_sides(d, h):
    pairs = [(a1, a2) for a1 in range(1, d + 1) for a2 in range(1, h + 1)]
    assert factors.legal_factors(d, h) == [(a1, a2) for a1, a2 in pairs if d % a1 == 0 and h % a2 == 0]


@quick
@given(n=st.integers(1, 400), wanted=st.integers(1, 500))
def test_nearest_divisors_are_the_number_itself_or_its_neighbours(n, wanted):
    below = next((i for i in range(wanted, 0, -1) if n % i == 0), None)
    above = next((i for i in range(wanted, n + 1) if n % i == 0), None)
    expected = [i for i in (below, above) if i is not None]
    assert factors.nearest_divisors(n, wanted) == sorted(set(expected))


@quick
@given(d=sizes, h=sizes, a1=st.integers(1, 80), a2=st.integers(1, 80))
def test_nearest_factors_have_the_smallest_ratio_to_the_wanted_ones(d, h, a1, a2):
    def distance(pair: tuple[int, int]) -> Fraction:
        ratios = [max(Fraction(i, j), Fraction(j, i)) for i, j in zip(pair, (a1, a2), strict=True)]
        return ratios[0] * ratios[1]

    assert factors.nearest_factors(d, h, a1, a2) == min(factors.legal_factors(d, h), key=distance)


@quick
@given(shapes=legal_layers(40))
def test_factor_shapes_split_both_sides_without_a_remainder(shapes):
    found = factor_shapes(shapes.d, shapes.h, shapes.a1, shapes.a2)
    assert found == shapes
    assert (found.d, found.h) == (shapes.a1 * shapes.b1, shapes.a2 * shapes.b2)


@quick
@given(d=sizes, h=sizes, a1=st.integers(1, 80), a2=st.integers(1, 80))
def test_factor_shapes_refuse_exactly_what_does_not_divide(d, h, a1, a2):
    if d % a1 == 0 and h % a2 == 0:
        factor_shapes(d, h, a1, a2)
        return
    with pytest.raises(FactorShapeError) as caught:
        factor_shapes(d, h, a1, a2)
    text = str(caught.value)
    assert (f"a1={a1} " in text) == (d % a1 != 0)
    assert (f"a2={a2} " in text) == (h % a2 != 0)
    assert str(factors.nearest_factors(d, h, a1, a2)) in text


def test_the_refusal_names_the_side_and_the_divisors_around_the_wanted_factor():
    with pytest.raises(FactorShapeError, match=r"a1=3 .* 640 output features .*2 and 4.*\(4, 64\)"):
        factor_shapes(640, 640, 3, 64)
    with pytest.raises(FactorShapeError, match=r"a2=1000 .* 640 input features .*640\)"):
        factor_shapes(640, 640, 4, 1000)


@quick
@given(shapes=legal_layers())
def test_krona_parameters_are_the_elements_of_both_factors(shapes):
    A, B = torch.empty(shapes.a1, shapes.a2), torch.empty(shapes.b1, shapes.b2)
    assert torch.kron(A, B).shape == (shapes.d, shapes.h)
    assert factors.krona_parameters(shapes.d, shapes.h, shapes.a1, shapes.a2) == A.numel() + B.numel()


@few
@given(shapes=legal_layers(), seed=st.integers(0, 2**31))
def test_krona_rank_is_the_rank_of_the_dense_product_of_generic_factors(shapes, seed):
    torch.manual_seed(seed)
    dense = torch.kron(generic(shapes.a1, shapes.a2), generic(shapes.b1, shapes.b2))
    assert rank(dense) == factors.krona_rank(shapes.d, shapes.h, shapes.a1, shapes.a2)


@pytest.mark.parametrize("count", [factors.krona_parameters, factors.krona_rank])
def test_counts_refuse_factors_that_do_not_fit(count):
    with pytest.raises(FactorShapeError):
        count(640, 640, 3, 64)


@quick
@given(n=st.integers(1, 2000), factor=lokr_factors)
def test_lokr_shapes_split_each_side_as_peft_does(n, factor):
    a, b = factorization(n, factor)
    assert factors.lokr_shapes(n, 1, factor) == (a, 1, b, 1)
    assert factors.lokr_shapes(1, n, factor) == (1, a, 1, b)


@few
@given(d=sizes, h=sizes, r=st.integers(1, 8))
def test_lora_parameters_are_those_of_pefts_lora(d, h, r):
    assert factors.lora_parameters(d, h, r) == trainable(adapted_by_peft(LoraConfig(r=r, target_modules=["0"]), d, h))


@few
@given(d=sizes, h=sizes, r=st.integers(1, 40), factor=lokr_factors)
def test_lokr_parameters_are_those_of_pefts_lokr(d, h, r, factor):
    config = LoKrConfig(r=r, decompose_factor=factor, target_modules=["0"])
    assert factors.lokr_parameters(d, h, r, factor) == trainable(adapted_by_peft(config, d, h))
    whole = LoKrConfig(r=d * h, decompose_factor=factor, target_modules=["0"])
    assert factors.lokr_parameters(d, h, None, factor) == trainable(adapted_by_peft(whole, d, h))


@few
@given(d=sizes, h=sizes, r=st.integers(1, 8))
def test_loha_parameters_are_those_of_pefts_loha(d, h, r):
    assert factors.loha_parameters(d, h, r) == trainable(adapted_by_peft(LoHaConfig(r=r, target_modules=["0"]), d, h))
