"""What looks at a run after each step: trackers, saved adapters, and pictures of validation prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState
from PIL import Image

from .output import Output
from .progress import TrainingStep
from .reports import Trackers, Validation
from .runtime import sharding_of
from .settings import Settings

_log = logging.getLogger(__name__)


@contextmanager
def no_matter(what: str) -> Iterator[None]:
    """Let something fail with a warning."""
    try:
        yield
    except Exception as error:
        _log.warning("%s: %s", what, error or type(error).__name__)


class Observers:
    """What looks at a run after each step: trackers, saved adapters, and pictures of validation prompts.

    The first process writes. Trackers and pictures that fail are told once, and the training goes on.

    Args:
        pipe: the pipeline in training.
        settings: of the run.
        output: its places.
        writes: whether this process does.
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
        """Look at what is known after a step."""
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
            with no_matter("The progress could not be written to its end"):
                self._trackers.close()
