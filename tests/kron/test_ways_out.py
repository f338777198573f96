"""What the mathematics' errors tell users to do instead is done here, and works."""

import re

import pytest
import torch

from diffusekrona import kron_linear
from diffusekrona.kron.nearest import choose_factors, nearest_kronecker
from diffusekrona.kron.shapes import factor_shapes
from tests.refusals import refusal


@pytest.mark.parametrize(("a1", "a2"), [(5, 64), (5, 4), (4, 7)])
def test_factors_that_the_text_names_fit(a1, a2):
    text = refusal(factor_shapes, 24, 30, a1, a2)
    factor_shapes(24, 30, *map(int, re.search(r"the nearest factors that fit are \((\d+), (\d+)\)", text).groups()))
    for name, near in re.findall(r"(a[12])=\d+ does not divide .*?nearest divisors: ([\d and]+)\)", text):
        for divisor in map(int, near.split(" and ")):
            assert {"a1": 24, "a2": 30}[name] % divisor == 0


def test_a_budget_that_the_text_names_is_enough():
    least = int(re.search(r"the smallest take (\d+)", refusal(choose_factors, torch.ones(24, 30), 10, 2))[1])
    choose_factors(torch.ones(24, 30), least, 2)
    refusal(choose_factors, torch.ones(24, 30), least - 1, 2)


@pytest.mark.parametrize(
    ("wrong", "said", "right"), [((0, 2), "a1 and a2 must be at least 1", (1, 2)), ((2, 2, 0), "at least 1", (2, 2, 1))]
)
def test_numbers_are_at_least_what_the_text_says(wrong, said, right):
    assert said in refusal(nearest_kronecker, torch.ones(4, 4), *wrong)
    nearest_kronecker(torch.ones(4, 4), *right)


def test_an_input_is_as_wide_as_the_text_says():
    A, B = torch.ones(2, 3), torch.ones(4, 5)
    with pytest.raises(ValueError, match=r"take 3·5 = 15 features in its last dimension"):
        kron_linear(torch.ones(7), A, B)
    assert kron_linear(torch.ones(15), A, B).shape == (8,)
