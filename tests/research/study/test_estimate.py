import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.study.estimate import estimate

numbers = st.floats(-5, 5)


@given(st.lists(st.lists(numbers, min_size=1, max_size=3), min_size=1, max_size=5))
def test_the_mean_is_of_the_subjects_means_and_lies_in_the_interval(groups):
    found = estimate(groups)
    assert found.mean == pytest.approx(np.mean([np.mean(group) for group in groups]), abs=1e-9)
    lowest, highest = min(map(min, groups)), max(map(max, groups))
    assert lowest - 1e-9 <= found.low <= found.high <= highest + 1e-9
    assert found.count == sum(map(len, groups))


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        subjects = rng.normal(0, 1, 12)
        found = estimate([list(mean + rng.normal(0, 0.3, 2)) for mean in subjects])
        hits += found.low <= 0 <= found.high
    assert 0.8 <= hits / 60 <= 1.0


def test_subjects_count_alike_however_often_they_were_measured():
    assert estimate([[0.0] * 9, [1.0]]).mean == 0.5


def test_nothing_has_no_mean_and_one_value_no_interval():
    assert math.isnan(estimate([]).mean)
    assert estimate([[]]).count == 0
    assert str(estimate([[0.25]])) == "0.250"
    assert "to" in str(estimate([[0.25], [0.5]]))


def test_a_rounding_error_below_zero_is_written_as_zero():
    assert str(estimate([[-1e-9, -2e-9]])) == "0.000 (0.000 to 0.000)"
    assert str(estimate([[-1e-9]])) == "0.000"
    assert str(estimate([[-0.25]])) == "-0.250"
