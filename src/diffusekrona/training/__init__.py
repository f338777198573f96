"""DreamBooth training: `train_dreambooth` for a Kronecker adapter, `fit` for any parameters of a pipeline."""

from typing import TYPE_CHECKING

from ..lazy import loaded_at_first_use

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "DatasetError",
    "ImagePlan",
    "TrainingConfig",
    "TrainingConfigError",
    "TrainingDivergedError",
    "TrainingImage",
    "TrainingInterrupted",
    "TrainingResult",
    "TrainingStep",
    "UnsupportedPipelineError",
    "accelerate_hooks",
    "fit",
    "load_dataset",
    "load_folder",
    "prepare_images",
    "read_checkpoint",
    "train_dreambooth",
    "training_resolution",
]

if TYPE_CHECKING:
    from ..errors import (
        CheckpointError,
        DatasetError,
        TrainingConfigError,
        TrainingDivergedError,
        TrainingInterrupted,
        UnsupportedPipelineError,
    )
    from .checkpoints import Checkpoint, Checkpoints, read_checkpoint
    from .config import TrainingConfig
    from .data import ImagePlan, TrainingImage, load_dataset, load_folder, prepare_images
    from .dreambooth import train_dreambooth, training_resolution
    from .loop import fit
    from .progress import TrainingResult, TrainingStep
    from .script_hooks import accelerate_hooks
else:
    __getattr__ = loaded_at_first_use(
        __name__,
        __all__,
        "..errors",
        ".config",
        ".data",
        ".checkpoints",
        ".progress",
        ".loop",
        ".dreambooth",
        ".script_hooks",
    )
