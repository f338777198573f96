"""Which layers to adapt (Appendix D.1, Figure 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..cells import Arm, Spec
from ..figures import against
from ..study import Page, Results, Study, arms_table, number


@dataclass(frozen=True)
class Modules(Study):
    """Kinds of layers.

    Args:
        learning_rate: of all of them.
    """

    subjects: int | None = 3
    learning_rate: float = 2e-3

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
        rate = {"learning_rate": self.learning_rate}
        arms = [
            Arm(label, Spec("krona", {"a1": 4, "a2": 64, "targets": modules}, rate))
            for label, modules in targets.items()
        ]
        both = Spec("krona", {"a1": 4, "a2": 64, "text_encoders": True}, {**rate, "train_text_encoder": True})
        return [*arms, Arm("attention and text encoders", both)]

    def page(self, results: Results) -> Page:
        """Scores and parameters of each kind."""
        table = arms_table(self.arms(), results, {"parameters": number(results, "parameters", ",.0f")})
        return Page(table, {"modules": against(self.arms(), results)})
