"""A whole run as its settings say: the base, the images, the training, and all that comes out."""

from __future__ import annotations

import gc
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from PIL import Image

from ..bases.loading import load_base
from ..errors import TrainingInterrupted
from ..evaluation import Encoders
from ..report import KronAReport, krona_report
from .data import ImagePlan, TrainingImage, load_dataset, load_folder, load_named_dataset
from .dreambooth import train_dreambooth, training_resolution
from .families import family_of
from .hub import check_hub, hub_repository, push
from .loop import TrainingResult, TrainingStep
from .optimizer_names import check_optimizer
from .output import Output
from .prior import draw_class_images
from .reports import Trackers, Validation, model_card, run_page
from .runtime import sharding_of, this_process
from .scores import score_adapters, scores_json, scores_rows
from .settings import Settings, settings_text

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
    done = _train(settings, output, on_step, on_class_image)
    gc.collect()  # the base, whose parts know each other, goes out of memory before anything is drawn
    if this_process().is_main_process:
        rows: Mapping[str, str] = {}
        if settings.output.score:
            with _no_matter("The adapters could not be scored"):
                rows = _scored(settings, output, done)
        with _no_matter("The report could not be written"):
            _tell(settings, output, done, rows)
        if repository is not None:
            with _no_matter(f"The adapter is in {output.path}, but could not be pushed to {repository}"):
                push(output.path, repository)
    return Outcome(done.result, done.report, done.saved, output.page)


@contextmanager
def _no_matter(what: str) -> Iterator[None]:
    """Let something fail with a warning."""
    try:
        yield
    except Exception as error:
        _log.warning("%s: %s", what, error or type(error).__name__)


@dataclass(frozen=True)
class _Done:
    """A training whose adapter is saved: what came of it, the pipeline's class, and the subject's images, each once."""

    result: TrainingResult
    report: KronAReport
    saved: list[Path]
    pipeline: str
    images: list[Image.Image]


def _train(
    settings: Settings, output: Output, on_step: OnStep | None, on_class_image: Callable[[int, int], None] | None
) -> _Done:
    data, adapter = settings.data, settings.adapter.config()
    pipe = _base(settings)
    plan = image_plan(settings, training_resolution(pipe, settings.images.resolution), family_of(pipe).reduction)
    images = training_images(settings, plan)
    others = class_images(pipe, settings, plan, on_class_image)
    writes = this_process().is_main_process
    if writes:
        output.write({output.folder / "settings.yaml": settings_text(settings)})
    observers = _Observers(pipe, settings, output, writes)

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
    facts = {"ss_steps": str(result.steps), "ss_learning_rate": str(settings.training.learning_rate)}
    saved = output.save(pipe, facts) if writes else []
    pictures = {image.source: image.image for image in images}
    return _Done(result, krona_report(pipe), saved, type(pipe).__name__, list(pictures.values()))


class _Observers:
    """What looks at a run after each step: trackers, saved adapters, and pictures of validation prompts.

    The first process writes. Trackers and pictures that fail are told once, and the training goes on.
    """

    def __init__(self, pipe: Any, settings: Settings, output: Output, writes: bool) -> None:
        chosen = settings.output
        found = output.checkpoints.newest() if chosen.resume else None
        self._trackers = (
            Trackers(output.folder / "tensorboard", settings.flat(), chosen.report_to, found.step if found else 0)
            if writes
            else None
        )
        self._pipe, self._output, self._writes, self._save_every = pipe, output, writes, chosen.save_every
        self._prompts, self._every = chosen.validation_prompt, chosen.validation_steps
        self._validation = Validation(
            pipe,
            self._prompts,
            output.folder / "validation" if writes else None,
            seed=settings.training.seed,
            steps=chosen.validation_inference_steps,
            guidance_scale=chosen.validation_guidance_scale,
        )
        self._failed: set[str] = set()

    def __call__(self, done: TrainingStep) -> None:
        if self._save_every is not None and done.step % self._save_every == 0 and self._writes:
            with done.averaged():
                self._output.save_step(self._pipe, done.step)
        if self._trackers is not None:
            with self._once("The progress could not be written down"):
                self._trackers.step(done)
        if not self._prompts or (done.step % self._every and done.step != done.steps):
            return
        images: list[Image.Image] | None = None
        if sharding_of(AcceleratorState()) is not None:
            images = self._drawn(done)  # in every process, as the first one needs the weights that are in the others
        elif self._writes:
            with self._once("The validation prompts could not be drawn"):
                images = self._drawn(done)
        if self._trackers is not None and images is not None:
            with self._once("The validation pictures could not be written down"):
                self._trackers.pictures(done.step, self._prompts, images)

    @contextmanager
    def _once(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                _log.warning("%s; the training goes on without: %s", what, error or type(error).__name__)
            self._failed.add(what)

    def _drawn(self, done: TrainingStep) -> list[Image.Image]:
        with done.averaged():
            return self._validation.draw(done.step)

    def close(self) -> None:
        """Write what is still to be written."""
        if self._trackers is not None:
            with _no_matter("The progress could not be written to its end"):
                self._trackers.close()


def _base(settings: Settings) -> Any:
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


def _scored(settings: Settings, output: Output, done: _Done) -> Mapping[str, str]:
    """Score the adapters of saved steps and the last one; a row for each of the report's table."""
    chosen, device = settings.output, this_process().device
    encoders = Encoders(chosen.clip, chosen.dino, device=device)
    found = score_adapters(
        _base(settings).to(device),
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


def _tell(settings: Settings, output: Output, done: _Done, scores: Mapping[str, str]) -> None:
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
