"""What can go wrong before or during training, as errors that a caller may want to catch."""

from __future__ import annotations

from pathlib import Path

from ..errors import DatasetError as DatasetError
from ..errors import KronAError


class TrainingConfigError(KronAError):
    """A `TrainingConfig` field holds a value that no run could use, or that this machine or base cannot."""


class UnsupportedPipelineError(KronAError):
    """The pipeline is not one that this trainer knows: Stable Diffusion 1.x, 2.x, SDXL or 3, text to image."""


class TrainingDivergedError(KronAError):
    """The loss or a trained weight stopped being a finite number."""


class CheckpointError(KronAError):
    """A run's checkpoint cannot be written or read, or belongs to another run."""


class TrainingInterrupted(KeyboardInterrupt):
    """The user stopped the run after a step; what it had learnt is in the pipeline.

    Attributes:
        checkpoint: the file that the run can go on from, or None.
    """

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        super().__init__(f"Stopped after step {step}.")
        self.step, self.checkpoint = step, checkpoint
