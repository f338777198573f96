"""Configurations of our own beside the paper's, judged on subjects that they were not chosen on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..cells import Arm, Cell
from ..results import Results, best_of, best_of_each
from ..settings import StudySettings, StudySettingsError
from .methods import ADAPTERS, Methods

PAPER, LORA = "KronA (4, 64)", "LoRA r=4"
RATES = (2e-4, 5e-4, 1e-3)


def _krona(a1: int, a2: int, **options: Any) -> dict[str, Any]:
    return {"method": "krona", "a1": a1, "a2": a2, "rates": RATES, **options}


@dataclass(frozen=True)
class Beyond(Methods):
    """The best of several configurations that have no more parameters than the first method, on the held-back subjects.

    Args:
        methods: as in `Methods`; the configurations and what they are compared with.
        rivals: labels of those that are compared with the best of all others, the first of which sets the number of
            parameters.
    """

    subjects: int | None = None
    methods: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            PAPER: {**_krona(4, 64), "rates": ADAPTERS},
            LORA: {"method": "lora", "rank": 4, "rates": ADAPTERS},
            "(2, 64)": _krona(2, 64),
            "(2, 32)": _krona(2, 32),
            "(8, 16)": _krona(8, 16),
            "(16, 8)": _krona(16, 8),
            "(64, 2)": _krona(64, 2),
            "A Kaiming uniform": _krona(4, 64, init_a="kaiming_uniform"),
            "alpha 4": _krona(4, 64, alpha=4.0),
            "B 8 times as fast": _krona(4, 64, training={"loraplus_lr_ratio": 8.0}),
            "A 8 times as fast": _krona(4, 64, training={"loraplus_lr_ratio": 0.125}),
            "V and O, two terms": _krona(4, 64, targets=r".*attn\d\.(to_v|to_out\.0)", num_terms=2),
            "K and V of cross-attention, four terms": _krona(4, 64, targets=r".*attn2\.(to_k|to_v)", num_terms=4),
        }
    )
    rivals: tuple[str, ...] = (PAPER, LORA)

    name: ClassVar[str] = "beyond"
    question: ClassVar[str] = (
        "(4, 64) on Q, K, V and O, A normal and B zero, is the best configuration (Section 4.2, Appendix D)."
    )

    def subjects_in(self, settings: StudySettings) -> tuple[str, ...]:
        """The held-back ones."""
        if not settings.held_back:
            raise StudySettingsError("The study beyond compares on held_back subjects, and the settings have none.")
        return settings.held_back[: self.subjects]

    def _search_cells(self, settings: StudySettings) -> list[Cell]:
        """Of all configurations, also those with one learning rate, as one is chosen among them."""
        self.subjects_in(settings)  # which there must be
        return self._search().plain_cells(settings, self.arms())

    def _compared(self, search: Results) -> list[Arm]:
        best = {arm.label: arm for arm in best_of_each(self.arms(), search)}
        counts = {label: search.estimate(arm, "parameters").mean for label, arm in best.items()}
        chosen = [
            arm for label, arm in best.items() if label not in self.rivals and counts[label] <= counts[self.rivals[0]]
        ]
        if not chosen:
            raise StudySettingsError(f"No configuration has at most the parameters of {self.rivals[0]}.")
        winner = best_of(chosen, search)
        return [winner, *(best[label] for label in self.rivals)]
