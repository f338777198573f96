"""A whole run as its settings say: the base, the images, the training, and all that comes out."""

from __future__ import annotations

import gc
import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..bases.loading import load_base
from ..errors import TrainingInterrupted
from ..evaluation import Encoders
from ..report import KronAReport, krona_report
from .data import ImagePlan, TrainingImage, load_dataset, load_folder, load_named_dataset
from .dreambooth import train_dreambooth, training_resolution
from .families import family_of
from .hub import check_hub, hub_repository, push
from .observers import Observers, no_matter
from .optimizer_names import check_optimizer
from .output import Output
from .prior import draw_class_images
from .progress import TrainingResult, TrainingStep
from .reports import model_card, run_page
from .runtime import this_process
from .scores import score_adapters, scores_json, scores_rows
from .settings import Settings, settings_text
from .status import StatusWriter, ended_in

_log = logging.getLogger(__name__)

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

    What the adapter does not need, such as the report, the sheet and the hub, comes after it is saved, and a failure
    there is a warning.

    Raises:
        KronAError: anything that the user can mend; see `train_dreambooth`.
        TrainingInterrupted: the user stopped it; the adapter so far is saved, too.
    """
    check_optimizer(settings.training)
    output = Output(settings)
    output.make_room()
    repository = hub_repository(settings.output)
    if repository is not None and this_process().is_main_process:
        check_hub(repository)
    status = status_of(settings, output) if this_process().is_main_process else None
    with ended_in(status):
        done = _train(settings, output, status, on_step, on_class_image)
        gc.collect()  # the base, whose parts know each other, goes out of memory before anything is drawn
        if status is not None:
            tell_all(settings, output, done)
    return Outcome(done.result, done.report, done.saved, output.page)


@dataclass(frozen=True)
class Done:
    """A training whose adapter is saved: what came of it, the pipeline's class, and the subject's images, each once."""

    result: TrainingResult
    report: KronAReport
    saved: list[Path]
    pipeline: str
    images: list[Image.Image]


def status_of(settings: Settings, output: Output) -> StatusWriter:
    """What a run tells of itself."""
    return StatusWriter(output.folder, settings.training.max_train_steps, settings.output.resume)


def _train(
    settings: Settings,
    output: Output,
    status: StatusWriter | None,
    on_step: OnStep | None,
    on_class_image: Callable[[int, int], None] | None,
) -> Done:
    """Train as the settings say; the process with a status writes."""
    data, adapter = settings.data, settings.adapter.config()
    pipe = base_of(settings)
    plan = image_plan(settings, training_resolution(pipe, settings.images.resolution), family_of(pipe).reduction)
    images = training_images(settings, plan)
    others = class_images(pipe, settings, plan, on_class_image)
    writes = status is not None
    if writes:
        output.write({output.folder / "settings.yaml": settings_text(settings)})
    observers = Observers(pipe, settings, output, status)

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
            held_out=held_out_images(settings, plan),
            init_from=data.init_from,
            on_step=after,
            folder=output.folder,
            resume=settings.output.resume,
            keep_encoders=bool(settings.output.validation_prompt),
        )
    except TrainingInterrupted as interrupt:
        if writes:
            interrupt.adapter = output.save_step(pipe, interrupt.step)
        raise
    finally:
        observers.close()
    return saved_run(pipe, settings, output, result, images, writes)


def saved_run(
    pipe: Any,
    settings: Settings,
    output: Output,
    result: TrainingResult,
    images: list[TrainingImage],
    writes: bool = True,
) -> Done:
    """Save the adapter of a run that is trained; what is known of it then."""
    facts = {"ss_steps": str(result.steps), "ss_learning_rate": str(settings.training.learning_rate)}
    saved = output.save(pipe, facts) if writes else []
    pictures = {image.source: image.image for image in images}
    report = krona_report(pipe, output.adapter_name)
    return Done(result, report, saved, type(pipe).__name__, list(pictures.values()))


def base_of(settings: Settings) -> Any:
    """The base as the settings say, without progress bars."""
    data = settings.data
    pipe = load_base(
        data.pretrained_model_name_or_path,
        getattr(torch, settings.base_dtype),
        settings.quantization,
        variant=data.variant,
        revision=data.revision,
        vae=data.pretrained_vae_model_name_or_path,
        configs=data.base_configs,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tell_all(settings: Settings, output: Output, done: Done) -> None:
    """What comes after an adapter is saved: scores, the report, the hub. What fails there is a warning."""
    rows: Mapping[str, str] = {}
    if settings.output.score:
        with no_matter("The adapters could not be scored"):
            rows = _scored(settings, output, done)
    with no_matter("The report could not be written"):
        _tell(settings, output, done, rows)
    repository = hub_repository(settings.output)
    if repository is not None:
        with no_matter(f"The adapter is in {output.path}, but could not be pushed to {repository}"):
            push(output.path, repository)


def _scored(settings: Settings, output: Output, done: Done) -> Mapping[str, str]:
    """Score the adapters of saved steps and the last one; a row for each of the report's table."""
    chosen, device = settings.output, this_process().device
    encoders = Encoders(chosen.clip, chosen.dino, device=device)
    found = score_adapters(
        base_of(settings).to(device),
        [*(file for file in output.step_files if file != output.step_file(done.result.steps)), done.saved[0]],
        chosen.validation_prompt,
        done.images,
        encoders,
        seed=settings.training.seed,
        steps=chosen.validation_inference_steps,
        guidance_scale=chosen.validation_guidance_scale,
    )
    output.write({output.folder / "scores.json": scores_json(found)})
    return scores_rows(found)


def _tell(settings: Settings, output: Output, done: Done, scores: Mapping[str, str]) -> None:
    """Write the run's page, and in a folder a model card."""
    data, result = settings.data, done.result
    facts = {
        "parameters": f"{done.report.parameters:,}, {done.report.share:.3%} of the base's",
        "steps": f"{result.steps} on {result.images} images, {result.seconds:.0f} s",
        "final loss": f"{result.final_loss:.4f}",
    }
    if losses := result.validation_losses:
        best = min(losses, key=lambda step: losses[step])
        facts["validation loss"] = f"{losses[result.steps]:.4f}; the least, {losses[best]:.4f}, after step {best}"
    prompt = data.instance_prompt or "the subject"
    sheet = output.folder / "validation" / "sheet.png"
    page = run_page(prompt, train_command(output.folder), {**facts, **scores}, settings.flat(), result.losses, sheet)
    files = {output.page: page}
    if output.card is not None:
        base, names = data.pretrained_model_name_or_path, [path.name for path in done.saved[1:]]
        adapter = hub_repository(settings.output) or str(output.path)
        files[output.card] = model_card(base, adapter, prompt, done.pipeline, facts, names)
    output.write(files)


def train_command(run_folder: Path, resume: bool = False) -> str:
    """The command line that repeats a run by the settings in its folder, or goes on with it."""
    command = f"diffusekrona train --config {shlex.quote(str(run_folder / 'settings.yaml'))}"
    return f"{command} --resume" if resume else command


def image_plan(settings: Settings, resolution: int, multiple: int) -> ImagePlan:
    """What becomes of each image."""
    return ImagePlan(
        **{**dict(settings.images), "resolution": resolution, "multiple": multiple, "seed": settings.training.seed}
    )


def training_images(settings: Settings, plan: ImagePlan) -> list[TrainingImage]:
    """The images of the subject."""
    data = settings.data
    prompt, columns = data.instance_prompt, (data.image_column, data.caption_column)
    if data.instance_data_dir is not None:
        found = load_folder(data.instance_data_dir, prompt, plan, data.caption_column)
    elif data.dataset_dir is not None:
        found = load_dataset(data.dataset_dir, prompt, plan, *columns)
    else:
        assert data.dataset_name is not None
        found = load_named_dataset(data.dataset_name, data.dataset_config_name, prompt, plan, *columns)
    return _with_trigger(found, data.trigger_word)


def held_out_images(settings: Settings, plan: ImagePlan) -> list[TrainingImage]:
    """The images that are not trained on; none where there is no folder of them."""
    data = settings.data
    if data.validation_data_dir is None:
        return []
    found = load_folder(data.validation_data_dir, data.instance_prompt, plan, data.caption_column)
    return _with_trigger(found, data.trigger_word)


def _with_trigger(images: list[TrainingImage], word: str | None) -> list[TrainingImage]:
    """Images with a word before each prompt that does not have it."""
    trigger = (word or "").strip()
    if not trigger:
        return images
    return [
        image if trigger in image.prompt else replace(image, prompt=f"{trigger}, {image.prompt}") for image in images
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
        # The others draw nothing, as the first one has drawn all.
        names = draw_class_images(
            pipe,
            prior.class_prompt,
            folder,
            prior.num_class_images,
            batch_size=prior.sample_batch_size,
            seed=settings.training.seed,
            device=state.device,
            on_image=on_image if state.is_main_process else None,
        )
    return load_folder(folder, prior.class_prompt, plan, only=names)
