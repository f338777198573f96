"""How the factors start (Figure 14, Appendix D.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..cells import Arm, Spec
from ..figures import against, beside
from ..markdown import arms_table, difference_table, learning_rate
from ..results import Results, best_of_each
from ..study import Page, Study


@dataclass(frozen=True)
class Init(Study):
    """Initialisations of A and B.

    Args:
        pairs: how A starts and how B starts.
        learning_rates: that each pair has to choose from, as some start much larger than others.
    """

    subjects: int | None = 3
    pairs: tuple[tuple[str, str], ...] = (
        ("normal", "zeros"),
        ("normal_sqrt", "zeros"),
        ("kaiming_uniform", "zeros"),
        ("xavier_uniform", "zeros"),
        ("zeros", "normal"),
        ("normal", "normal"),
        ("kaiming_uniform", "kaiming_uniform"),
        ("xavier_uniform", "xavier_uniform"),
    )
    learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)

    name: ClassVar[str] = "init"
    question: ClassVar[str] = (
        "B = 0 with A normal or Kaiming uniform is best; both normal, or both Xavier uniform, worst (Figure 14)."
    )

    def arms(self) -> Sequence[Arm]:
        """All pairs at all learning rates."""
        return [
            Arm(
                f"A {a}, B {b}",
                Spec("krona", {"a1": 4, "a2": 64, "init_a": a, "init_b": b}, {"learning_rate": rate}),
            )
            for a, b in self.pairs
            for rate in self.learning_rates
        ]

    def page(self, results: Results) -> Page:
        """Scores of each pair at its best learning rate, and how far they are from the first's."""
        best = best_of_each(self.arms(), results)
        figures = {"init": against(best, results), **beside(self.name, best, results)}
        table = arms_table(best, results, {"learning rate": learning_rate})
        return Page(f"{table}\n\n{difference_table(best[1:], best[0], results)}", figures)
