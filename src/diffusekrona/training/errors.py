"""What can go wrong before or during training, as errors that a caller may want to catch."""

from ..errors import KronAError


class DatasetError(KronAError):
    """The training images or their captions are missing, unreadable or unusable."""


class TrainingConfigError(KronAError):
    """A `TrainingConfig` field holds a value that no run could use, or that this machine or base cannot."""


class UnsupportedPipelineError(KronAError):
    """The pipeline is not one that this trainer knows: Stable Diffusion 1.x, 2.x or SDXL, text to image."""


class TrainingDivergedError(KronAError):
    """The loss or a trained weight stopped being a finite number."""
