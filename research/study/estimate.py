"""Means with intervals over subjects and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval.

    Attributes:
        mean: over all values.
        low: lower end of the interval.
        high: upper end.
        count: how many values.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        mean, low, high = (f"{round(value, 3) + 0.0:.3f}" for value in (self.mean, self.low, self.high))  # no -0.000
        return mean if self.count < 2 else f"{mean} ({low} to {high})"


def estimate(values: Sequence[Sequence[float]]) -> Estimate:
    """Mean of the groups' means, with a bootstrap interval.

    Subjects differ more than seeds do, and another study would have other subjects: whole groups are drawn anew, with
    replacement, then values within each.

    Args:
        values: one group of values per subject.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in values if len(group)]
    count = sum(len(group) for group in groups)
    if not groups:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean([group.mean() for group in groups]))
    rng = np.random.default_rng(0)
    subjects = rng.integers(len(groups), size=(RESAMPLES, len(groups)))
    drawn = np.zeros_like(subjects, dtype=np.float64)
    for number, group in enumerate(groups):
        here = subjects == number
        drawn[here] = rng.choice(group, (int(here.sum()), len(group))).mean(axis=1)
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return Estimate(mean, float(low), float(high), count)
