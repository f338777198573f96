"""Which factors to choose (Figure 15, Table 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..cells import Arm, Spec
from ..figures import along
from ..markdown import arms_table, difference_table, learning_rate, number
from ..results import Results, best_of, best_of_each
from ..study import Page, Study


@dataclass(frozen=True)
class Factors(Study):
    """A grid of (a1, a2).

    Args:
        a1: rows of A.
        a2: columns of A.
        learning_rates: that each pair has to choose from, as A starts smaller the larger a2 is.
    """

    subjects: int | None = 3
    a1: tuple[int, ...] = (1, 2, 4, 8, 16)
    a2: tuple[int, ...] = (1, 4, 16, 64)
    learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)

    name: ClassVar[str] = "factors"
    question: ClassVar[str] = (
        "a2 = 64 and a1 in {2, 4, 8} are best, (4, 64) the best of all; A is to be smaller than B; factors of at most "
        "8 do not follow the prompt (Section 4.2, Appendix D.2, Figure 15, Table 6)."
    )

    def arms(self) -> Sequence[Arm]:
        """All pairs at all learning rates."""
        return [
            Arm(
                f"({a1}, {a2})",
                Spec("krona", {"a1": a1, "a2": a2}, {"learning_rate": rate}),
                series=f"a1 = {a1}",
                x=a2,
            )
            for a1 in self.a1
            for a2 in self.a2
            for rate in self.learning_rates
        ]

    def page(self, results: Results) -> Page:
        """Scores and parameters of each pair at its best learning rate, and how far they are from the best pair's."""
        best = best_of_each(self.arms(), results)
        first = best_of(best, results)
        more = {
            "learning rate": learning_rate,
            "parameters": number(results, "parameters", ",.0f"),
            "ms a step": number(results, "seconds_per_step", ".0f", 1e-3),
        }
        others = difference_table([arm for arm in best if arm is not first], first, results)
        return Page(f"{arms_table(best, results, more)}\n\n{others}", {"factors": along(best, results, "a2")})
