"""Which layers to adapt (Appendix D.1, Figure 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..cells import Arm
from ..figures import against, beside
from ..markdown import arms_table, difference_table, learning_rate, number
from ..results import Results, best_of_each
from ..study import Page, Study, spec_of


@dataclass(frozen=True)
class Modules(Study):
    """Kinds of layers.

    Args:
        learning_rates: that each kind has to choose from.
    """

    subjects: int | None = 3
    learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)

    name: ClassVar[str] = "modules"
    question: ClassVar[str] = (
        "Attention alone is enough: adapting the feed-forward layers, too, doubles the parameters and does not make "
        "pictures better (Appendix D.1, Figure 13)."
    )

    def arms(self) -> Sequence[Arm]:
        """Presets, each of Q, K, V and O, and the text encoders."""
        targets = {
            "attention": "attention",
            "attention and feed-forward": "attention+ff",
            "cross-attention": "cross-attention",
            "Q": r".*attn\d\.to_q",
            "K": r".*attn\d\.to_k",
            "V": r".*attn\d\.to_v",
            "O": r".*attn\d\.to_out\.0",
        }
        kinds: dict[str, dict[str, Any]] = {label: {"targets": modules} for label, modules in targets.items()}
        kinds["attention and text encoders"] = {"text_encoders": True, "training": {"train_text_encoder": True}}
        return [
            Arm(label, spec_of({"method": "krona", "a1": 4, "a2": 64, **kind}, learning_rate=rate))
            for label, kind in kinds.items()
            for rate in self.learning_rates
        ]

    def page(self, results: Results) -> Page:
        """Scores and parameters of each kind at its best learning rate, and how far they are from the first's."""
        best = best_of_each(self.arms(), results)
        more = {"learning rate": learning_rate, "parameters": number(results, "parameters", ",.0f")}
        figures = {"modules": against(best, results), **beside(self.name, best, results)}
        text = f"{arms_table(best, results, more)}\n\n{difference_table(best[1:], best[0], results)}"
        return Page(text, figures)
