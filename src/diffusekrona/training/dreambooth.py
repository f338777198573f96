"""DreamBooth with a Kronecker adapter: a few images of one subject, a rare word as its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..errors import TrainingConfigError
from ..pipeline import InjectedAdapter, hotswap_krona, inject_krona, unload_krona
from ..tuner.compat import adapters_off
from ..tuner.config import KronAConfig
from ..tuner.injected import krona_layers
from .checkpoints import base_identity
from .config import TrainingConfig
from .data import ImagePlan, TrainingImage, load_folder, prepare_images
from .export import ABOUT_ADAPTER
from .families import family_of
from .loop import fit
from .progress import TrainingResult, TrainingStep
from .runtime import seeded


def train_dreambooth(
    pipe: Any,
    images: str | Path | Sequence[Image.Image] | Sequence[TrainingImage],
    prompt: str,
    config: TrainingConfig | None = None,
    krona_config: KronAConfig | None = None,
    *,
    plan: ImagePlan | None = None,
    class_images: Sequence[TrainingImage] = (),
    held_out: Sequence[TrainingImage] = (),
    init_from: Path | None = None,
    adapter_name: str = "default",
    on_step: Callable[[TrainingStep], None] | None = None,
    folder: Path | None = None,
    resume: bool = False,
    keep_encoders: bool = True,
) -> TrainingResult:
    """Teach a pipeline one subject (Section 4.1), as an adapter that `save_krona` then saves.

    All or nothing: if anything but the user stops the run, the new adapter is taken out of the pipeline
    again. After Ctrl-C it stays, as far as it was trained, and the pipeline works with it.

    Args:
        pipe: a pipeline of a family that `families` has. It is moved to the training device and its weights are frozen.
        images: a folder (see `load_folder` for captions), or images, prepared or not; the paper uses 3 to 5.
        prompt: the subject's name, a rare word and a class like "a sks toy"; for images without a caption.
        config: how to train; the paper's defaults if left out.
        krona_config: the adapter; (4, 64) on the attention projections if left out.
        plan: what becomes of images that are not prepared; their middle squares, of the pipeline's own size, if left
            out.
        class_images: of other subjects of the class, which the model shall draw as before.
        held_out: images that are not trained on; their loss is computed now and then.
        init_from: a saved adapter of the same layers and shapes that the new one begins as.
        adapter_name: name of the new adapter in the pipeline.
        on_step: called after every optimizer step, for progress.
        folder: for checkpoints and what is cached on disk.
        resume: go on from the newest checkpoint in the folder, if there is one.
        keep_encoders: without, the pipeline loses its autoencoder, and text encoders that are not trained, as soon as
            images and prompts are encoded; it cannot draw pictures any more, but the adapter can be saved.

    Raises:
        DatasetError: the images or captions are missing or unreadable.
        UnsupportedPipelineError: the pipeline is of another kind.
        TrainingConfigError: the configuration does not suit the pipeline or the machine.
        TrainingDivergedError: a loss, a gradient or a factor is not finite.
        CheckpointError: one cannot be written, or belongs to another run.
        KronAError: the adapter cannot be injected.
    """
    config, krona_config = config or TrainingConfig(), krona_config or KronAConfig()
    family_of(pipe)
    about = about_run(krona_config, base_identity(pipe))
    examples = _examples(images, prompt, plan or ImagePlan(training_resolution(pipe, None)))
    with begun_adapter(pipe, config, krona_config, adapter_name, init_from) as krona:
        return fit(
            pipe,
            examples,
            dict(krona.named_parameters()),
            config,
            on_step,
            class_images=class_images,
            held_out=held_out,
            as_base=partial(_switched_off, krona),
            folder=folder,
            resume=resume,
            about=about,
            keep_encoders=keep_encoders,
        )


def about_run(krona_config: KronAConfig, base: str) -> dict[str, Any]:
    """What tells a run from others beside how it trains: its adapter's config, and `base_identity` of its base."""
    return {f"{ABOUT_ADAPTER}{name}": value for name, value in krona_config.to_dict().items()} | {
        "the base model": base
    }


@contextmanager
def begun_adapter(
    pipe: Any, config: TrainingConfig, krona_config: KronAConfig, adapter_name: str, init_from: Path | None
) -> Iterator[InjectedAdapter]:
    """Put a fresh adapter, or what a saved one holds, into a pipeline; any error but Ctrl-C takes it out again."""
    with seeded(config.seed, torch.device("cpu")):
        krona = inject_krona(
            pipe,
            krona_config,
            adapter_name=adapter_name,
            text_encoders=config.adapted_encoders,
            denoiser=config.train_denoiser,
        )
    try:
        if init_from is not None:
            hotswap_krona(pipe, init_from, adapter_name)
        yield krona
    except KeyboardInterrupt:
        raise
    except BaseException:
        unload_krona(pipe, adapter_name)
        raise


@contextmanager
def _switched_off(krona: InjectedAdapter) -> Iterator[None]:
    """Let the layers of an adapter be the base's for a while."""
    layers = [layer for component in krona.components.values() for layer in krona_layers(component).values()]
    with adapters_off(layers):
        yield


def training_resolution(pipe: Any, resolution: int | None) -> int:
    """Side of the training images in pixels: the one asked for, or else the one the denoiser was trained at.

    Raises:
        TrainingConfigError: it is not divisible by the autoencoder's reduction, or by that of the denoiser's patches.
    """
    family = family_of(pipe)
    if resolution is None:
        return family.resolution
    reduction = family.reduction
    if resolution % reduction:
        below = resolution // reduction * reduction
        near = " or ".join(str(side) for side in (below, below + reduction) if side)
        raise TrainingConfigError(
            f"resolution {resolution} is not divisible by {reduction}, by which the model reduces images; use {near}."
        )
    return resolution


def _examples(
    images: str | Path | Sequence[Image.Image] | Sequence[TrainingImage], prompt: str, plan: ImagePlan
) -> list[TrainingImage]:
    if isinstance(images, (str, Path)):
        return load_folder(images, prompt, plan)
    prepared = [image for image in images if isinstance(image, TrainingImage)]
    if len(prepared) == len(images) > 0:
        return prepared
    return prepare_images([image for image in images if isinstance(image, Image.Image)], prompt, plan)
