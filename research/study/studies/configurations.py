"""How to configure KronA: which factors, how they start, on which layers (Section 4.2, Appendix D.1 and D.2)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..cells import Arm
from ..figures import against, along, beside
from ..markdown import arms_table, difference_table, learning_rate, number
from ..results import Results, best_of, best_of_each
from ..study import Page, Study, spec_of


@dataclass(frozen=True)
class _Configurations(Study):
    """Configurations of KronA, each at its best learning rate.

    Args:
        learning_rates: that each has to choose from, as some start with much larger factors than others.
    """

    subjects: int | None = 3
    learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)

    @abstractmethod
    def configurations(self) -> Mapping[str, Mapping[str, Any]]:
        """Options of KronA (4, 64) by label."""

    def arms(self) -> Sequence[Arm]:
        """All configurations at all learning rates."""
        return [
            Arm(label, spec_of({"method": "krona", "a1": 4, "a2": 64, **options}, learning_rate=rate))
            for label, options in self.configurations().items()
            for rate in self.learning_rates
        ]

    def page(self, results: Results) -> Page:
        """Each configuration at its best learning rate, and how far its scores are from the first's."""
        best = best_of_each(self.arms(), results)
        figures = {self.name: against(best, results), **beside(self.name, best, results)}
        table = arms_table(best, results, self._columns(results))
        return Page(f"{table}\n\n{difference_table(best[1:], best[0], results)}", figures)

    def _columns(self, results: Results) -> dict[str, Callable[[Arm], str]]:
        """Columns of the page's table beside the scores."""
        return {"learning rate": learning_rate}


@dataclass(frozen=True)
class FactorShapes(_Configurations):
    """A grid of (a1, a2).

    Args:
        a1: rows of A.
        a2: columns of A.
    """

    a1: tuple[int, ...] = (1, 2, 4, 8, 16)
    a2: tuple[int, ...] = (1, 4, 16, 64)

    name: ClassVar[str] = "factors"
    question: ClassVar[str] = (
        "a2 = 64 and a1 in {2, 4, 8} are best, (4, 64) the best of all; A is to be smaller than B; factors of at most "
        "8 do not follow the prompt (Section 4.2, Appendix D.2, Figure 15, Table 6)."
    )

    def configurations(self) -> Mapping[str, Mapping[str, Any]]:
        """All pairs."""
        return {f"({a1}, {a2})": {"a1": a1, "a2": a2} for a1 in self.a1 for a2 in self.a2}

    def arms(self) -> Sequence[Arm]:
        """All pairs at all learning rates, a line of a figure for each a1."""
        options = ((arm, arm.spec.options) for arm in super().arms())
        return [replace(arm, series=f"a1 = {krona['a1']}", x=krona["a2"]) for arm, krona in options]

    def page(self, results: Results) -> Page:
        """Each pair at its best learning rate, and how far its scores are from the best pair's."""
        best = best_of_each(self.arms(), results)
        first = best_of(best, results)
        others = difference_table([arm for arm in best if arm is not first], first, results)
        table = arms_table(best, results, self._columns(results))
        return Page(f"{table}\n\n{others}", {self.name: along(best, results, "a2")})

    def _columns(self, results: Results) -> dict[str, Callable[[Arm], str]]:
        return {
            **super()._columns(results),
            "parameters": number(results, "parameters", ",.0f"),
            "ms a step": number(results, "seconds_per_step", ".0f", 1e-3),
        }


@dataclass(frozen=True)
class Init(_Configurations):
    """Initialisations of A and B (Figure 14).

    Args:
        pairs: how A starts and how B starts.
    """

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

    name: ClassVar[str] = "init"
    question: ClassVar[str] = (
        "B = 0 with A normal or Kaiming uniform is best; both normal, or both Xavier uniform, worst (Figure 14)."
    )

    def configurations(self) -> Mapping[str, Mapping[str, Any]]:
        """All pairs."""
        return {f"A {a}, B {b}": {"init_a": a, "init_b": b} for a, b in self.pairs}


@dataclass(frozen=True)
class Modules(_Configurations):
    """Kinds of layers."""

    name: ClassVar[str] = "modules"
    question: ClassVar[str] = (
        "Attention alone is enough: adapting the feed-forward layers, too, doubles the parameters and does not make "
        "pictures better (Appendix D.1, Figure 13)."
    )

    def configurations(self) -> Mapping[str, Mapping[str, Any]]:
        """Presets, each of Q, K, V and O, and the text encoders."""
        return {
            "attention": {"targets": "attention"},
            "attention and feed-forward": {"targets": "attention+ff"},
            "cross-attention": {"targets": "cross-attention"},
            "Q": {"targets": r".*attn\d\.to_q"},
            "K": {"targets": r".*attn\d\.to_k"},
            "V": {"targets": r".*attn\d\.to_v"},
            "O": {"targets": r".*attn\d\.to_out\.0"},
            "attention and text encoders": {"text_encoders": True, "training": {"train_text_encoder": True}},
        }

    def _columns(self, results: Results) -> dict[str, Callable[[Arm], str]]:
        return {**super()._columns(results), "parameters": number(results, "parameters", ",.0f")}
