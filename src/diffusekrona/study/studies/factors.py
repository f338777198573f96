"""Which factors to choose (Figure 15, Table 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..cells import Arm, Spec
from ..figures import along
from ..study import Page, Results, Study, arms_table, number


@dataclass(frozen=True)
class Factors(Study):
    """A grid of (a1, a2).

    Args:
        a1: rows of A.
        a2: columns of A.
        learning_rate: of all of them.
    """

    subjects: int | None = 3
    a1: tuple[int, ...] = (1, 2, 4, 8, 16)
    a2: tuple[int, ...] = (1, 4, 16, 64)
    learning_rate: float = 2e-3

    name: ClassVar[str] = "factors"
    question: ClassVar[str] = (
        "a2 = 64 and a1 in {2, 4, 8} are best, (4, 64) the best of all; A is to be smaller than B; factors of at most "
        "8 do not follow the prompt (Section 4.2, Appendix D.2, Figure 15, Table 6)."
    )

    def arms(self) -> Sequence[Arm]:
        """All pairs."""
        return [
            Arm(
                f"({a1}, {a2})",
                Spec("krona", {"a1": a1, "a2": a2}, {"learning_rate": self.learning_rate}),
                series=f"a1 = {a1}",
                x=a2,
            )
            for a1 in self.a1
            for a2 in self.a2
        ]

    def page(self, results: Results) -> Page:
        """Scores and parameters of each pair."""
        time = {"ms a step": number(results, "seconds_per_step", ".0f", 1e-3)}
        table = arms_table(self.arms(), results, {"parameters": number(results, "parameters", ",.0f"), **time})
        return Page(table, {"factors": along(self.arms(), results, "a2")})
