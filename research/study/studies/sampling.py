"""How long to train, on how many pictures, and how to draw (Appendix D.4 to D.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..cells import Arm, Spec, View
from ..figures import along, beside
from ..markdown import arms_table, difference_table
from ..results import Results, best_of
from ..study import Page, Study


@dataclass(frozen=True)
class _Along(Study):
    """KronA (4, 64) with one thing varied."""

    subjects: int | None = 3
    learning_rate: float = 5e-4
    axis: ClassVar[str]

    def spec(self, images: int | None = None) -> Spec:
        """The method and its learning rate, which all arms share."""
        return Spec("krona", {"a1": 4, "a2": 64}, {"learning_rate": self.learning_rate}, images)

    def page(self, results: Results) -> Page:
        """Scores along the axis, and how far they are from the best's."""
        arms = self.arms()
        best = best_of(arms, results)
        others = [arm for arm in arms if arm is not best]
        text = f"{arms_table(arms, results)}\n\n{difference_table(others, best, results)}"
        figures = {self.name: along(arms, results, self.axis, log=False)}
        return Page(text, {**figures, **beside(self.name, arms, results)})


@dataclass(frozen=True)
class Steps(_Along):
    """Optimizer steps.

    Args:
        steps: at which one and the same training is looked at.
    """

    steps: tuple[int, ...] = (100, 250, 500, 750, 1000, 1500)

    name: ClassVar[str] = "steps"
    axis: ClassVar[str] = "steps"
    question: ClassVar[str] = (
        "Fidelity comes between 500 and 1000 steps; more steps refine it (Appendix D.4, Figures 17 and 18)."
    )

    def arms(self) -> Sequence[Arm]:
        """One for each number."""
        return [Arm(f"{n} steps", self.spec(), View(step=n), "KronA (4, 64)", n) for n in self.steps]


@dataclass(frozen=True)
class Images(_Along):
    """Pictures of the subject.

    Args:
        images: how many are trained on.
    """

    images: tuple[int, ...] = (1, 2, 3, 5)

    name: ClassVar[str] = "images"
    axis: ClassVar[str] = "pictures"
    question: ClassVar[str] = "One picture is enough; more give more variety (Appendix D.5, Figures 19 and 20)."

    def arms(self) -> Sequence[Arm]:
        """One for each number."""
        return [
            Arm("1 picture" if n == 1 else f"{n} pictures", self.spec(n), View(), "KronA (4, 64)", n)
            for n in self.images
        ]


@dataclass(frozen=True)
class Guidance(_Along):
    """Guidance of the pictures.

    Args:
        scales: of classifier-free guidance; 1 is none.
    """

    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0)

    name: ClassVar[str] = "guidance"
    axis: ClassVar[str] = "guidance scale"
    question: ClassVar[str] = "A guidance of 7 to 10 is best (Appendix D.6, Figure 21)."

    def arms(self) -> Sequence[Arm]:
        """One for each scale."""
        return [
            Arm(f"guidance {one:g}", self.spec(), View(guidance_scale=one), "KronA (4, 64)", one) for one in self.scales
        ]


@dataclass(frozen=True)
class InferenceSteps(_Along):
    """Denoising steps of the pictures.

    Args:
        steps: how many.
    """

    steps: tuple[int, ...] = (5, 10, 20, 50, 100)

    name: ClassVar[str] = "inference-steps"
    axis: ClassVar[str] = "denoising steps"
    question: ClassVar[str] = (
        "30 to 70 denoising steps are best, about 50; beyond 100 pictures get worse (Appendix D.6, Figure 22)."
    )

    def arms(self) -> Sequence[Arm]:
        """One for each number."""
        return [
            Arm(f"{n} denoising steps", self.spec(), View(inference_steps=n), "KronA (4, 64)", n) for n in self.steps
        ]
