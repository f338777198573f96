"""Numbers and pictures of a run for TensorBoard, and for Weights & Biases where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ..errors import TrainingConfigError
from .loop import TrainingStep

ReportTo = Literal["tensorboard", "wandb"]


class Trackers:
    """Where a run's progress is written.

    Args:
        folder: of TensorBoard's files; those of Weights & Biases go beside it.
        settings: of the run.
        report_to: "wandb" for Weights & Biases, too.
        resumed_at: the step that the run goes on from; what TensorBoard has of later ones is hidden.

    Raises:
        TrainingConfigError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], report_to: ReportTo, resumed_at: int = 0) -> None:
        self._board = SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else None)
        self._wandb: Any = None
        if report_to == "wandb":
            if importlib.util.find_spec("wandb") is None:
                raise TrainingConfigError("report_to 'wandb' needs the package: pip install wandb.")
            import wandb

            self._wandb = wandb.init(project="diffusekrona", config=dict(settings), dir=str(folder.parent))

    def step(self, done: TrainingStep) -> None:
        """Write down a step."""
        values = {"loss": done.loss, "learning_rate": done.learning_rate, "images_per_second": done.images_per_second}
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, done.step)
        if self._wandb is not None:
            self._wandb.log(values, step=done.step)

    def pictures(self, step: int, prompts: Sequence[str], images: Sequence[Image.Image]) -> None:
        """Write down validation pictures."""
        for number, image in enumerate(images):
            self._board.add_image(f"validation/{number}", np.asarray(image), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            pairs = zip(prompts, images, strict=True)
            self._wandb.log({"validation": [wandb.Image(image, caption=prompt) for prompt, image in pairs]}, step=step)

    def close(self) -> None:
        """Write what is still to be written."""
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
