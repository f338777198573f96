"""How much the learning rate matters (Figures 4 and 16, Appendix D.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import pstdev
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..cells import Arm
from ..estimate import estimate
from ..figures import along, gallery
from ..markdown import arms_table, difference_table
from ..results import Results, best_of, quality
from ..study import Page, Study, spec_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USEFUL_SHARE = 0.9
"""A learning rate is of use where its quality is at least this share of the method's best."""


@dataclass(frozen=True)
class Stability(Study):
    """The same learning rates for every method.

    Args:
        learning_rates: in rising order.
        methods: by label: the method's name and its options.
    """

    subjects: int | None = 6
    seeds: tuple[int, ...] = (0, 1)
    learning_rates: tuple[float, ...] = (1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2)
    methods: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "KronA (4, 64)": {"method": "krona", "a1": 4, "a2": 64},
            "LoRA r=4": {"method": "lora", "rank": 4},
            "LoRA r=1": {"method": "lora", "rank": 1},
        }
    )

    name: ClassVar[str] = "stability"
    question: ClassVar[str] = (
        "KronA gives good pictures over a wider range of learning rates than LoRA (Figure 4, Figure 16, Appendix D.3)."
    )

    def arms(self) -> Sequence[Arm]:
        """Every method at every learning rate."""
        return [
            Arm(f"{label}, {rate:g}", spec_of(method, learning_rate=rate), series=label, x=rate)
            for label, method in self.methods.items()
            for rate in self.learning_rates
        ]

    def page(self, results: Results) -> Page:
        """Scores over learning rates, and how wide each method's useful range is."""
        arms, rates = self.arms(), self.learning_rates
        best = [best_of([arm for arm in arms if arm.series == label], results) for label in self.methods]
        explained = (
            f"Learning rates of use are those with at least {USEFUL_SHARE:.0%} of the best quality of "
            "the same subject and seed, between measured ones by a straight line over their logarithms; how many "
            "powers of ten they cover says how much may be wrong with a guess. A spread is the standard deviation "
            "of a score over all learning rates, within a subject and a seed."
        )
        parts = [explained, self._summary(results, rates)]
        if len(rates) > 2:
            parts += [f"It depends on where a sweep ends. Up to {rates[-2]:g}:", self._summary(results, rates[:-1])]
        parts += [
            "At the best learning rates:",
            difference_table(best[1:], best[0], results),
            arms_table(arms, results),
        ]
        figures = {"stability": along(arms, results, "learning rate"), **self._pictures(results)}
        return Page("\n\n".join(parts), figures)

    def _summary(self, results: Results, rates: Sequence[float]) -> str:
        """A row for each method, over some of the learning rates."""
        lines = [
            "| | best quality, at | learning rates of use, decades | spread of DINO | spread of CLIP-T |",
            "|---|---|---|---|---|",
        ]
        for label in self.methods:
            line = [arm for arm in self.arms() if arm.series == label and arm.x in rates]
            best = best_of(line, results)
            decades = _over([results.qualities(arm) for arm in line], lambda values: _decades(rates, values))
            spreads = [_over([results.found(arm, what) for arm in line], pstdev) for what in ("dino", "clip_t")]
            lines.append(f"| {label} | {quality(results, best)}, {best.x:g} | {decades} | {' | '.join(spreads)} |")
        return "\n".join(lines)

    def _pictures(self, results: Results) -> dict[str, Figure]:
        """Rows for each method and two of the prompts, along the learning rates."""
        found = results.pictures(self.arms())
        if found is None:
            return {}
        prompts, rates = list(found[0]), len(self.learning_rates)
        rows = {
            f"{label}: {prompt.format('…')}": [row[prompt] for row in found[number * rates : (number + 1) * rates]]
            for prompt in (prompts[0], prompts[len(prompts) // 2])
            for number, label in enumerate(self.methods)
        }
        return {"stability-pictures": gallery(rows, [f"{rate:g}" for rate in self.learning_rates])}


def _decades(rates: Sequence[float], qualities: Sequence[float]) -> float:
    """How many powers of ten the learning rates of use cover."""
    at = np.log10(rates)
    between = np.interp(np.linspace(at[0], at[-1], 2001), at, qualities)
    return float((between >= USEFUL_SHARE * max(qualities)).mean() * (at[-1] - at[0]))


def _over(by_arm: Sequence[Sequence[Sequence[float]]], of: Callable[[Sequence[float]], float]) -> str:
    """Mean and interval of a number that each subject and seed gets from its values along a line of arms."""
    if len({tuple(len(group) for group in groups) for groups in by_arm}) > 1:
        return "– (some diverged)"
    return str(estimate([[of(values) for values in zip(*groups, strict=True)] for groups in zip(*by_arm, strict=True)]))
