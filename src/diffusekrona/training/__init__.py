"""DreamBooth training: `train_dreambooth` for a Kronecker adapter, `fit` for any parameters of a pipeline."""

from .config import TrainingConfig
from .data import TrainingImage, load_folder, prepare_images
from .dreambooth import train_dreambooth
from .errors import DatasetError, TrainingConfigError, TrainingDivergedError, UnsupportedPipelineError
from .loop import TrainingResult, TrainingStep, fit

__all__ = [
    "DatasetError",
    "TrainingConfig",
    "TrainingConfigError",
    "TrainingDivergedError",
    "TrainingImage",
    "TrainingResult",
    "TrainingStep",
    "UnsupportedPipelineError",
    "fit",
    "load_folder",
    "prepare_images",
    "train_dreambooth",
]
