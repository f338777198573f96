"""The rank that training uses (Appendix E.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..cells import Arm, View
from ..figures import COLOURS
from ..markdown import arms_table, number
from ..results import Results
from ..study import Page, Study, spec_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Rank(Study):
    """Singular values of the updates.

    Args:
        methods: by label: the method's name, its options and, as `training`, how it is trained.
    """

    subjects: int | None = 3
    methods: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "KronA (4, 64)": {"method": "krona", "a1": 4, "a2": 64, "training": {"learning_rate": 5e-4}},
            "LoRA r=4": {"method": "lora", "rank": 4, "training": {"learning_rate": 1e-4}},
            "full DreamBooth": {"method": "dreambooth", "training": {"learning_rate": 2e-6}},
        }
    )

    name: ClassVar[str] = "rank"
    question: ClassVar[str] = (
        "A Kronecker product's rank is the product of its factors' ranks, so that KronA has more singular values to "
        "work with than LoRA at fewer parameters (Theorem E.2, Appendix E.1)."
    )

    def arms(self) -> Sequence[Arm]:
        """One for each method."""
        return [Arm(label, spec_of(method), View(spectrum=True)) for label, method in self.methods.items()]

    def page(self, results: Results) -> Page:
        """How many singular values hold 90% of the energy, and how much the first four hold."""
        more = {
            "values with 90% of the energy": number(results, "spectrum.rank90", ".1f"),
            "stable rank": number(results, "spectrum.stable_rank", ".2f"),
            "energy of the first four": number(results, "spectrum.energy4", ".1%"),
            "norm of the update": number(results, "spectrum.norm", ".3f"),
        }
        return Page(arms_table(self.arms(), results, more), {"rank": self._drawn(results)})

    def _drawn(self, results: Results) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.0, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        labels = [arm.label for arm in self.arms()]
        for panel, what, title in (
            (left, "rank90", "singular values with 90% of the energy"),
            (right, "stable_rank", "stable rank"),
        ):
            values = [results.estimate(arm, f"spectrum.{what}").mean for arm in self.arms()]
            panel.bar(labels, values, color=COLOURS[: len(labels)])
            panel.set_title(title, fontsize=9)
            panel.tick_params(axis="x", labelrotation=30, labelsize=7)
        return figure
