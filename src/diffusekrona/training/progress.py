"""What is known of a run after each step, and at its end."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field


class Interrupted:
    """Whether a run was asked to stop; and a way to ask."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.ask = self._asked.set

    def __call__(self) -> bool:
        """Whether it was."""
        return self._asked.is_set()


@dataclass(frozen=True)
class TrainingStep:
    """What is known after each optimizer step.

    Attributes:
        step: how many are done, from 1.
        steps: how many there will be.
        loss: of this step, averaged over its batches; NaN where the step was skipped.
        average: mean loss of the last 50 steps, or of all so far; steadier, because noise levels are random.
        learning_rate: that this step used.
        seconds: since this run, or the part of it after it was resumed, began its first step.
        images_per_second: in that time, of all processes together.
        validation_loss: of the held-out images after this step, over noise that is the same each time; None where it
            was not computed.
        averaged: with it, the parameters are for a while what they would end as now: with `ema_decay`, their averages.
        interrupted: whether the run was asked to stop, and a way to ask: it ends after its next step, as by Ctrl-C.
    """

    step: int
    steps: int
    loss: float
    average: float
    learning_rate: float
    seconds: float
    images_per_second: float
    validation_loss: float | None = None
    averaged: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, repr=False, compare=False)
    interrupted: Interrupted = field(default_factory=Interrupted, repr=False, compare=False)


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run was.

    Attributes:
        losses: one per optimizer step; NaN where it was skipped.
        seconds: that the steps took, without loading and encoding.
        images: how many images it was trained on.
        parameters: how many numbers were trained.
        resumed_at: the step that it went on from; 0 where it started anew.
        validation_losses: of the held-out images, by step.
    """

    losses: tuple[float, ...]
    seconds: float
    images: int
    parameters: int
    resumed_at: int = 0
    validation_losses: Mapping[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.losses)

    @property
    def final_loss(self) -> float:
        """Mean over the last 50 steps; one step's loss says little, because its noise levels are random."""
        return recent_mean(self.losses)


def recent_mean(losses: Sequence[float]) -> float:
    """Mean of the last 50 losses that are finite."""
    recent = [loss for loss in losses[-50:] if math.isfinite(loss)]
    return sum(recent) / len(recent) if recent else math.nan
