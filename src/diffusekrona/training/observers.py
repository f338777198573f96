"""What looks at a run after each step: its status, trackers, saved adapters, pictures, and what it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState
from PIL import Image

from ..errors import TrainingConfigError
from .output import Output
from .progress import TrainingStep
from .reports import Trackers, Validation
from .requests import Requests
from .runtime import sharding_of
from .settings import Settings
from .status import StatusWriter

_log = logging.getLogger(__name__)


@contextmanager
def no_matter(what: str) -> Iterator[None]:
    """Let something fail with a warning."""
    try:
        yield
    except Exception as error:
        _log.warning("%s: %s", what, error or type(error).__name__)


class Observers:
    """What looks at a run after each step: its status, trackers, saved adapters, pictures, and what it is asked for.

    The first process writes. Trackers and pictures that fail are told once, and the training goes on.

    Args:
        pipe: the pipeline in training.
        settings: of the run.
        output: its places.
        status: what the run tells of itself; None in a process that does not write.
    """

    def __init__(self, pipe: Any, settings: Settings, output: Output, status: StatusWriter | None) -> None:
        chosen, writes = settings.output, status is not None
        self._status, self._requests = status, Requests(output.folder) if writes else None
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
        """Look at what is known after a step, and do what was asked for meanwhile."""
        if self._status is not None:
            self._status.step(done)
        self._look(done)
        self._do_requests(done)

    def _look(self, done: TrainingStep) -> None:
        """What is due after this step."""
        if self._save_every is not None and done.step % self._save_every == 0 and self._writes:
            self._save(done)
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

    def _save(self, done: TrainingStep) -> None:
        with done.averaged():
            self._output.save_step(self._pipe, done.step)

    def _do_requests(self, done: TrainingStep) -> None:
        """Do what was asked for; what fails is a warning each time."""
        if self._requests is None or self._status is None:
            return
        status = self._status
        for request in self._requests.due(status.tell, done.interrupted):
            if request.what == "stop":
                done.interrupted.ask()
            elif request.what == "save":
                with no_matter("The adapter could not be saved as asked for"):
                    self._save(done)
            else:
                with no_matter("The pictures that were asked for could not be drawn"):
                    self._sample(done, request.prompt)

    def _sample(self, done: TrainingStep, prompt: str | None) -> None:
        """Draw a prompt that was asked for, or the validation prompts."""
        if sharding_of(AcceleratorState()) is not None:
            raise TrainingConfigError("this process has not all weights, as FSDP splits them.")
        if prompt is None and not self._prompts:
            raise TrainingConfigError("the run has no validation_prompt, and none was given.")
        if prompt is None:
            self._drawn(done)
        else:
            with done.averaged():
                self._validation.draw_asked(done.step, prompt)

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
            with no_matter("The progress could not be written to its end"):
                self._trackers.close()
