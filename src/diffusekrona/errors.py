"""The errors that a caller may want to catch. Their texts say what was found and what to do."""

from __future__ import annotations

from pathlib import Path


class KronAError(ValueError):
    """Base of every error that diffusekrona raises on purpose."""


class ConfigError(KronAError):
    """A `KronAConfig` field holds a value that no layer could use."""


class FactorShapeError(KronAError):
    """A layer's size is not divisible by the factors asked for it, or the layer is not linear."""


class AdapterNameError(KronAError):
    """An adapter name is taken, or no adapter has it."""


class AdapterFileError(KronAError):
    """An adapter file is missing, damaged, not finite, or made for another architecture."""


class MergeError(KronAError):
    """A merge would give non-finite weights, or the weights to unmerge are not the ones that were merged."""


class BatchError(KronAError):
    """The samples of a batch cannot each have the adapter that is given for them."""


class StoreFullError(KronAError):
    """A store's adapters that are in use leave no room for another one within its budget."""


class DatasetError(KronAError):
    """Images, or the captions beside them, are missing, unreadable or unusable."""


class TrainingConfigError(KronAError):
    """A `TrainingConfig` field holds a value that no run could use, or that this machine or base cannot."""


class UnsupportedPipelineError(KronAError):
    """The pipeline is of no family that this trainer knows, or is none from text to image."""


class TrainingDivergedError(KronAError):
    """The loss or a trained weight stopped being a finite number."""


class CheckpointError(KronAError):
    """A run's checkpoint cannot be written or read, or belongs to another run."""


class TrainingInterrupted(KeyboardInterrupt):
    """The user stopped the run after a step; what it had learnt is in the pipeline.

    Attributes:
        checkpoint: the file that the run can go on from, or None.
        adapter: the file of the adapter as it was then, or None.
    """

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        super().__init__(f"Stopped after step {step}.")
        self.step, self.checkpoint = step, checkpoint
        self.adapter: Path | None = None


class EvaluationError(KronAError):
    """An encoder cannot be had or does not fit, or the images to compare do not go together."""
