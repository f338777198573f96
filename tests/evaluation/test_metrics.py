"""The formulas, against loops over plain numbers."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusekrona.evaluation import EvaluationError
from diffusekrona.evaluation.metrics import Score, drift, image_similarity, text_similarity


def features(count: int, seed: int, width: int = 12) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def cosine(x: list[float], y: list[float]) -> float:
    dot, xx, yy = 0.0, 0.0, 0.0
    for a, b in zip(x, y, strict=True):
        dot, xx, yy = dot + a * b, xx + a * a, yy + b * b
    return dot / (math.sqrt(xx) * math.sqrt(yy))


def test_image_similarity_is_the_mean_over_all_pairs() -> None:
    generated, real = features(5, 0), features(3, 1)
    total, own = 0.0, []
    for g in generated.tolist():
        row = [cosine(r, g) for r in real.tolist()]
        own.append(sum(row) / 3)
        total += sum(row)
    score = image_similarity(generated, real)
    assert score.mean == pytest.approx(total / (5 * 3), rel=1e-12)
    assert score.values == pytest.approx(own, rel=1e-12)


def test_text_similarity_takes_each_image_with_its_own_prompt() -> None:
    images, prompts = features(4, 0), features(4, 1)
    own = [cosine(x, y) for x, y in zip(images.tolist(), prompts.tolist(), strict=True)]
    score = text_similarity(images, prompts)
    assert score.values == pytest.approx(own, rel=1e-12)
    assert score.mean == pytest.approx(sum(own) / 4, rel=1e-12)


def test_the_spread_is_the_standard_deviation_over_the_images() -> None:
    score = image_similarity(features(5, 0), features(3, 1))
    mean = sum(score.values) / 5
    assert score.spread == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in score.values) / 5), rel=1e-12)
    assert Score((0.25,)).spread == 0


def test_drift_runs_from_alike_to_opposite() -> None:
    base = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    adapted = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert drift(adapted, base).values == (0.0, 0.5, 1.0)
    assert drift(adapted, base).mean == 0.5


def test_drift_is_one_less_cosine_halved() -> None:
    adapted, base = features(4, 0), features(4, 1)
    own = [(1 - cosine(x, y)) / 2 for x, y in zip(adapted.tolist(), base.tolist(), strict=True)]
    assert drift(adapted, base).values == pytest.approx(own, rel=1e-12)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.randoms(use_true_random=False))
def test_no_order_of_the_images_changes_a_bit(m: int, n: int, width: int, shuffler: random.Random) -> None:
    generated, real, prompts = features(m, 0, width), features(n, 1, width), features(m, 2, width)
    rows, columns = list(range(m)), list(range(n))
    shuffler.shuffle(rows)
    shuffler.shuffle(columns)
    pairs = [
        (image_similarity(generated, real), image_similarity(generated[rows], real[columns])),
        (text_similarity(generated, prompts), text_similarity(generated[rows], prompts[rows])),
        (drift(generated, prompts), drift(generated[rows], prompts[rows])),
    ]
    for before, after in pairs:
        assert after.values == tuple(before.values[row] for row in rows)
        assert (after.mean, after.spread) == (before.mean, before.spread)


def test_half_precision_features_are_measured_in_double() -> None:
    generated, real = features(3, 0).bfloat16(), features(2, 1).bfloat16()
    assert image_similarity(generated, real).values == image_similarity(generated.double(), real.double()).values


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_features_that_mean_nothing_are_named(bad: float) -> None:
    broken = features(3, 0)
    broken[1] = bad
    with pytest.raises(EvaluationError, match="image 2 of 3 are zero or not finite"):
        image_similarity(broken, features(2, 1))


@pytest.mark.parametrize(
    ("left", "right", "said"),
    [
        ((0, 4), (2, 4), "at least one image"),
        ((4,), (2, 4), "at least one image"),
        ((2, 4), (2, 5), "4 and 5 wide"),
        ((2, 4), (3, 4), "2 images on one side and 3"),
    ],
)
def test_features_that_do_not_go_together_are_refused(left: tuple[int, ...], right: tuple[int, ...], said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        drift(torch.ones(left), torch.ones(right))
