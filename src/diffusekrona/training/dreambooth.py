"""DreamBooth with a Kronecker adapter: a few images of one subject, a rare word as its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..config import KronAConfig
from ..pipeline import inject_krona, unload_krona
from .conditioning import check_pipeline
from .config import TrainingConfig
from .data import TrainingImage, load_folder, prepare_images
from .errors import TrainingConfigError
from .loop import TrainingResult, TrainingStep, fit
from .runtime import seeded


def train_dreambooth(
    pipe: Any,
    images: str | Path | Sequence[Image.Image],
    prompt: str,
    config: TrainingConfig | None = None,
    krona_config: KronAConfig | None = None,
    *,
    adapter_name: str = "default",
    on_step: Callable[[TrainingStep], None] | None = None,
) -> TrainingResult:
    """Teach a pipeline one subject (Section 4.1), as an adapter that `save_krona` then saves.

    All or nothing: if anything but the user stops the run, the new adapter is taken out of the pipeline
    again. After Ctrl-C it stays, as far as it was trained, and the pipeline works with it.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or SDXL pipeline. It is moved to the training device and its weights
            are frozen.
        images: a folder (see `load_folder` for captions), or images; the paper uses 3 to 5.
        prompt: the subject's name, a rare word and a class like "a sks toy"; for images without a caption.
        config: how to train; the paper's defaults if left out.
        krona_config: the adapter; (4, 64) on the attention projections if left out.
        adapter_name: name of the new adapter in the pipeline.
        on_step: called after every optimizer step, for progress.

    Raises:
        DatasetError: the images or captions are missing or unreadable.
        UnsupportedPipelineError: the pipeline is of another kind.
        TrainingConfigError: the configuration does not suit the pipeline or the machine.
        TrainingDivergedError: the loss or a factor is not finite.
        KronAError: the adapter cannot be injected.
    """
    config = config or TrainingConfig()
    check_pipeline(pipe)
    examples = _examples(images, prompt, training_resolution(pipe, config.resolution))
    with seeded(config.seed, torch.device("cpu")):
        krona = inject_krona(
            pipe, krona_config or KronAConfig(), adapter_name=adapter_name, text_encoders=config.text_encoders
        )
    try:
        return fit(pipe, examples, krona.parameters(), config, on_step)
    except KeyboardInterrupt:
        raise
    except BaseException:
        unload_krona(pipe, adapter_name)
        raise


def training_resolution(pipe: Any, resolution: int | None) -> int:
    """Side of the training images in pixels: the one asked for, or else the one the UNet was trained at.

    Raises:
        TrainingConfigError: it is not divisible by the autoencoder's reduction.
    """
    reduction: int = pipe.vae_scale_factor
    if resolution is None:
        size = pipe.unet.config.sample_size
        return int(size if isinstance(size, int) else min(size)) * reduction
    if resolution % reduction:
        below = resolution // reduction * reduction
        near = " or ".join(str(side) for side in (below, below + reduction) if side)
        raise TrainingConfigError(
            f"resolution {resolution} is not divisible by {reduction}, the autoencoder's reduction; use {near}."
        )
    return resolution


def _examples(images: str | Path | Sequence[Image.Image], prompt: str, resolution: int) -> list[TrainingImage]:
    if isinstance(images, (str, Path)):
        return load_folder(images, prompt, resolution)
    return prepare_images(images, prompt, resolution)
