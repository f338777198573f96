"""A batch of pictures, drawn by one pipeline, each with its own adapter."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import Any

from ..errors import AdapterNameError, KronAError, StoreFullError
from ..generation import generated
from ..generation.prompts import chunks_needed
from ..inputs.images import image_png
from .endpoint import unknown_model
from .gather import Outcome
from .picture import Picture, Refusal
from .store import AdapterStore

_log = logging.getLogger(__name__)


class AbandonedError(Exception):
    """Nobody waits for the pictures of a batch any more."""


class Drawer:
    """Draws pictures so that each is what it is when it is drawn alone.

    Args:
        pipe: the pipeline.
        store: its adapters.
    """

    def __init__(self, pipe: Any, store: AdapterStore) -> None:
        self._pipe, self._store = pipe, store
        self._negative = "negative_prompt" in inspect.signature(pipe.__call__).parameters

    def refusal(self, picture: Picture) -> Refusal | None:
        """Why a picture cannot be drawn at all, as far as is known before its adapter is read."""
        if picture.model is not None and picture.model not in self._store:
            return unknown_model(picture.model).refusal
        if picture.negative_prompt is not None and not self._negative:
            return Refusal(400, "This base takes no negative_prompt.", "negative_prompt")
        return None

    def kind(self, picture: Picture) -> Hashable:
        """Pictures of equal kinds go together: of one size and number of steps, with prompts in as many chunks."""
        size = (picture.width, picture.height)
        return size, picture.steps, picture.guidance_scale, picture.negative_prompt, self._chunks(picture)

    def ahead(self, pictures: Sequence[Picture]) -> None:
        """Begin to load the adapters of pictures that are drawn next."""
        self._store.prefetch(picture.model for picture in pictures)

    def draw(self, pictures: Sequence[Picture], abandoned: Callable[[], bool] = lambda: False) -> list[Outcome]:
        """Draw pictures of one kind. What is wrong with one of them costs no other.

        Args:
            pictures: what to draw.
            abandoned: tells whether to stop, as nobody waits.
        """
        found: dict[int, Outcome] = {}
        while len(found) < len(pictures):
            left = [number for number in range(len(pictures)) if number not in found]
            with ExitStack() as kept:
                ready = self._ready(left, pictures, kept, found)
                chosen = [pictures[number] for number in ready]
                found.update(zip(ready, self._together(chosen, abandoned), strict=True))
        return [found[number] for number in range(len(pictures))]

    def _ready(
        self, left: list[int], pictures: Sequence[Picture], kept: ExitStack, found: dict[int, Outcome]
    ) -> list[int]:
        """Those of the pictures that are left whose adapters are in memory now, and stay; those that fail are found."""
        ready: list[int] = []
        for number in left:
            name = pictures[number].model
            try:
                if name is not None:
                    kept.enter_context(self._store.kept([name]))
                ready.append(number)
            except StoreFullError as error:
                if not ready:  # alone it will not fit later, either
                    found[number] = Refusal(503, str(error), "model", "adapter_too_large")
            except AdapterNameError:
                found[number] = unknown_model(str(name)).refusal
            except KronAError as error:
                _log.warning("The adapter %r cannot be used: %s", name, error)
                found[number] = Refusal(
                    422,
                    f"The adapter {name!r} cannot be used; the server's log has the reason.",
                    "model",
                    "bad_adapter",
                )
        return ready

    def _together(self, pictures: list[Picture], abandoned: Callable[[], bool]) -> list[Outcome]:
        """Draw all in one pass; where that fails, each alone, so that the one that is at fault fails alone."""
        if not pictures:
            return []
        try:
            return self._pass(pictures, abandoned)
        except AbandonedError:
            return [Refusal(499, "Nobody waited for the picture.")] * len(pictures)
        except Exception as error:
            if len(pictures) > 1:
                return [outcome for picture in pictures for outcome in self._together([picture], abandoned)]
            _log.exception("A picture could not be drawn")
            return [Refusal(500, f"The picture could not be drawn: {type(error).__name__}.")]

    def _pass(self, pictures: list[Picture], abandoned: Callable[[], bool]) -> list[Outcome]:
        def stop_if_abandoned(done: int, steps: int) -> None:
            if abandoned():
                raise AbandonedError

        first = pictures[0]
        with self._store.batch([picture.model for picture in pictures]):
            images = generated(
                self._pipe,
                [picture.prompt for picture in pictures],
                [picture.seed for picture in pictures],
                guidance_scale=first.guidance_scale,
                steps=first.steps,
                batch_size=len(pictures),
                height=first.height,
                width=first.width,
                negative_prompt=first.negative_prompt,
                on_step=stop_if_abandoned,
            )
            return [image_png(image) for image in images]

    def _chunks(self, picture: Picture) -> int:
        if not hasattr(self._pipe, "unet") or getattr(self._pipe, "tokenizer", None) is None:
            return 1
        return chunks_needed(self._pipe, [picture.prompt, picture.negative_prompt or ""])
