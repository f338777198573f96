"""A whole run as its settings say: the base, the images, the training, and all that comes out."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from PIL import Image

from ..base import load_base
from ..errors import KronAError
from ..pipeline import save_krona
from ..report import KronAReport, krona_report
from ..storage import write_whole
from .checkpoints import Checkpoints
from .data import ImagePlan, TrainingImage, load_dataset, load_folder
from .dreambooth import train_dreambooth, training_resolution
from .families import family_of
from .loop import TrainingResult, TrainingStep
from .prior import draw_class_images
from .reports import Trackers, Validation, model_card, run_page
from .runtime import sharding_of, this_process
from .settings import Settings, settings_text

OnStep = Callable[[TrainingStep], None]


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        result: of the training.
        report: of the adapter.
        saved: where the adapter is, and its copies.
        page: the run's report.
    """

    result: TrainingResult
    report: KronAReport
    saved: list[Path]
    page: Path


def run(
    settings: Settings, on_step: OnStep | None = None, on_class_image: Callable[[int, int], None] | None = None
) -> Outcome:
    """Train and save an adapter. Of several processes, the first one writes.

    Raises:
        KronAError: anything that the user can mend; see `train_dreambooth`.
    """
    output = settings.output
    make_room_for(output.output_dir)
    if not output.resume and not output.overwrite:
        _checkpoints(settings).check_free()
    done = _train(settings, on_step, on_class_image)
    gc.collect()  # the base, whose parts know each other, goes out of memory before anything is drawn
    if this_process().is_main_process:
        _tell(settings, done)
        if output.push_to_hub is not None:
            _push(output.output_dir, output.push_to_hub)
    return Outcome(done.result, done.report, done.saved, output.run_folder / "report.html")


@dataclass(frozen=True)
class _Done:
    """A training whose adapter is saved."""

    result: TrainingResult
    report: KronAReport
    saved: list[Path]
    pipeline: str


def _train(settings: Settings, on_step: OnStep | None, on_class_image: Callable[[int, int], None] | None) -> _Done:
    output, data, adapter = settings.output, settings.data, settings.adapter.config()
    pipe = load_base(data.pretrained_model_name_or_path, getattr(torch, settings.base_dtype))
    pipe.set_progress_bar_config(disable=True)
    plan = image_plan(settings, training_resolution(pipe, settings.images.resolution), family_of(pipe).reduction)
    images = training_images(settings, plan)
    others = class_images(pipe, settings, plan, on_class_image)
    writes = this_process().is_main_process
    if writes:
        write_whole({output.run_folder / "settings.yaml": settings_text(settings).encode()})
    observers = _Observers(pipe, settings, writes)

    def after(done: TrainingStep) -> None:
        observers(done)
        if writes and on_step is not None:
            on_step(done)

    try:
        result = train_dreambooth(
            pipe,
            images,
            data.instance_prompt or "",
            settings.training,
            adapter,
            class_images=others,
            on_step=after,
            folder=output.run_folder,
            resume=output.resume,
            keep_encoders=bool(output.validation_prompt),
        )
    finally:
        observers.close()
    saved = _save(pipe, settings, result.steps) if writes else []
    return _Done(result, krona_report(pipe), saved, type(pipe).__name__)


class _Observers:
    """What looks at a run after each step: trackers, and pictures of validation prompts. The first process writes."""

    def __init__(self, pipe: Any, settings: Settings, writes: bool) -> None:
        output = settings.output
        found = _checkpoints(settings).newest() if output.resume else None
        self._trackers = (
            Trackers(output.run_folder / "tensorboard", settings.flat(), output.report_to, found.step if found else 0)
            if writes
            else None
        )
        self._prompts, self._every = output.validation_prompt, output.validation_steps
        self._validation = Validation(
            pipe,
            self._prompts,
            output.run_folder / "validation" if writes else None,
            seed=settings.training.seed,
            steps=output.validation_inference_steps,
            guidance_scale=output.validation_guidance_scale,
        )

    def __call__(self, done: TrainingStep) -> None:
        due = self._prompts and (done.step % self._every == 0 or done.step == done.steps)
        if self._trackers is not None:
            self._trackers.step(done)
            if due:
                self._trackers.pictures(done.step, self._prompts, self._drawn(done))
        elif due and sharding_of(AcceleratorState()) is not None:
            self._drawn(done)  # the first process needs the weights that are here

    def _drawn(self, done: TrainingStep) -> list[Image.Image]:
        with done.averaged():
            return self._validation.draw(done.step)

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()


def _checkpoints(settings: Settings) -> Checkpoints:
    return Checkpoints(settings.output.run_folder / "checkpoints", settings.training.checkpoints_total_limit)


def _save(pipe: Any, settings: Settings, steps: int) -> list[Path]:
    """The adapter and its copies."""
    output = settings.output
    single = output.output_dir.suffix == ".safetensors"
    whole = output.output_dir if single else output.output_dir / f"{output.output_dir.absolute().name}.safetensors"
    saved = [save_krona(pipe, output.output_dir), *([] if single else [save_krona(pipe, whole)])]
    if output.also is not None:
        facts = {"ss_steps": str(steps), "ss_learning_rate": str(settings.training.learning_rate)}
        copy = whole.with_name(f"{whole.stem}-{output.also}.safetensors")
        saved.append(save_krona(pipe, copy, format=output.also, metadata=facts))
    return saved


def _tell(settings: Settings, done: _Done) -> None:
    """Write the run's page, and in a folder a model card."""
    output, data, result = settings.output, settings.data, done.result
    facts = {
        "parameters": f"{done.report.parameters:,}, {done.report.share:.3%} of the base's",
        "steps": f"{result.steps} on {result.images} images, {result.seconds:.0f} s",
        "final loss": f"{result.final_loss:.4f}",
    }
    prompt = data.instance_prompt or "the subject"
    sheet = output.run_folder / "validation" / "sheet.png"
    page = run_page(prompt, train_command(output.run_folder), facts, settings.flat(), result.losses, sheet)
    files = {output.run_folder / "report.html": page}
    if output.output_dir.suffix != ".safetensors":
        base, names = data.pretrained_model_name_or_path, [path.name for path in done.saved[1:]]
        adapter = output.push_to_hub or str(output.output_dir)
        files[output.output_dir / "README.md"] = model_card(base, adapter, prompt, done.pipeline, facts, names)
    write_whole({path: text.encode() for path, text in files.items()})


def train_command(run_folder: Path, resume: bool = False) -> str:
    """The command line that repeats a run by the settings in its folder, or goes on with it."""
    command = f"diffusekrona train --config {shlex.quote(str(run_folder / 'settings.yaml'))}"
    return f"{command} --resume" if resume else command


def _push(path: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        if path.suffix == ".safetensors":
            api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repository)
        else:
            api.upload_folder(folder_path=path, repo_id=repository, ignore_patterns=["run/*"])
    except (OSError, ValueError) as error:
        raise KronAError(f"The adapter is in {path}, but could not be pushed to {repository}: {error}") from error


def image_plan(settings: Settings, resolution: int, multiple: int) -> ImagePlan:
    """What becomes of each image."""
    return ImagePlan(
        **{**dict(settings.images), "resolution": resolution, "multiple": multiple, "seed": settings.training.seed}
    )


def training_images(settings: Settings, plan: ImagePlan) -> list[TrainingImage]:
    """The images of the subject."""
    data = settings.data
    if data.instance_data_dir is not None:
        found = load_folder(data.instance_data_dir, data.instance_prompt, plan, data.caption_column)
    else:
        assert data.dataset_dir is not None
        found = load_dataset(data.dataset_dir, data.instance_prompt, plan, data.image_column, data.caption_column)
    trigger = (data.trigger_word or "").strip()
    if not trigger:
        return found
    return [
        image if trigger in image.prompt else replace(image, prompt=f"{trigger}, {image.prompt}") for image in found
    ]


def class_images(
    pipe: Any, settings: Settings, plan: ImagePlan, on_image: Callable[[int, int], None] | None
) -> list[TrainingImage]:
    """The images of others of the class, drawn where they are missing; none without prior preservation."""
    prior, state = settings.prior, this_process()
    if not prior.with_prior_preservation or prior.class_prompt is None:
        return []
    folder = prior.class_data_dir or settings.output.run_folder / "class"
    with state.main_process_first():
        if state.is_main_process:
            draw_class_images(
                pipe,
                prior.class_prompt,
                folder,
                prior.num_class_images,
                batch_size=prior.sample_batch_size,
                seed=settings.training.seed,
                device=state.device,
                on_image=on_image,
            )
    return load_folder(folder, prior.class_prompt, plan)


def make_room_for(output: Path) -> None:
    """Fail before the training, not after it, where the adapter could not be saved."""
    if output.suffix == ".safetensors":
        if output.is_dir():
            raise KronAError(f"output_dir {output} is a folder; a file that ends in .safetensors was expected.")
        output.parent.mkdir(parents=True, exist_ok=True)
    elif output.is_file():
        raise KronAError(f"output_dir {output} is a file; give a folder, or a file that ends in .safetensors.")
    else:
        output.mkdir(parents=True, exist_ok=True)
