"""Pictures that many ask for, gathered into batches of those that can be drawn in one pass."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .picture import Picture, Refusal

_log = logging.getLogger(__name__)

Outcome = bytes | Refusal
Draw = Callable[[Sequence[Picture], Callable[[], bool]], Sequence[Outcome]]
"""Draws pictures of one kind; the second argument tells whether nobody waits for any of them any more."""


@dataclass(eq=False)
class _Entry:
    picture: Picture
    kind: Hashable
    arrived: float
    done: asyncio.Future[Outcome]


class Gatherer:
    """Draws pictures in batches, one after the other, in a thread.

    A batch is begun by the picture that has waited longest. It takes in those of its kind up to `size`, and waits for
    more until its first one has waited for `wait` seconds. A picture that nobody waits for any more leaves its place at
    once; where that is true of a whole running batch, this ends at its next step.

    Args:
        draw: draws a batch.
        size: pictures of a batch at most.
        wait: seconds.
        most: how many pictures may wait, beside the running batch's.
        ahead: is told the pictures of the next batch, as far as they are known, while one runs.
    """

    def __init__(
        self,
        draw: Draw,
        *,
        size: int,
        wait: float,
        most: int,
        ahead: Callable[[Sequence[Picture]], None] = lambda pictures: None,
    ) -> None:
        self._draw, self._size, self._wait, self._most, self._ahead = draw, size, wait, most, ahead
        self._waiting: list[_Entry] = []
        self._running: list[_Entry] = []
        self._came = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "krona-draw")

    @property
    def waiting(self) -> int:
        """How many pictures wait."""
        return len(self._waiting)

    async def drawn(self, picture: Picture, kind: Hashable, timeout: float) -> Outcome:
        """A picture, or why there is none.

        Args:
            picture: what to draw.
            kind: pictures of equal kinds can be drawn in one batch.
            timeout: seconds after which it is given up.
        """
        if len(self._waiting) >= self._most:
            return Refusal(429, f"{len(self._waiting)} pictures wait already; try again later.", code="queue_full")
        loop = asyncio.get_running_loop()
        entry = _Entry(picture, kind, loop.time(), loop.create_future())
        self._waiting.append(entry)
        self._came.set()
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        self._tell_ahead()
        try:
            return await asyncio.wait_for(entry.done, timeout)
        except asyncio.TimeoutError:
            return Refusal(504, f"The picture was not done after {timeout:g} seconds.", code="timeout")
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)

    async def _run(self) -> None:
        while self._waiting:
            await self._until_full()
            if not self._waiting:
                return
            self._running = self._next()
            self._waiting = [entry for entry in self._waiting if entry not in self._running]
            self._tell_ahead()
            batch, outcomes = self._running, await self._outcomes(self._running)
            self._running = []
            for entry, outcome in zip(batch, outcomes, strict=True):
                if not entry.done.done():
                    entry.done.set_result(outcome)

    async def _outcomes(self, batch: list[_Entry]) -> Sequence[Outcome]:
        pictures = [entry.picture for entry in batch]
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._thread, self._draw, pictures, lambda: all(entry.done.done() for entry in batch)
            )
        except Exception as error:
            _log.exception("A batch could not be drawn")
            return [Refusal(500, f"The picture could not be drawn: {type(error).__name__}.")] * len(batch)

    async def _until_full(self) -> None:
        """Wait until the next batch is full, or its first picture has waited long enough, or none waits."""
        loop = asyncio.get_running_loop()
        while self._waiting and len(self._next()) < self._size:
            left = self._waiting[0].arrived + self._wait - loop.time()
            if left <= 0:
                return
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), left)
            except asyncio.TimeoutError:
                return

    def _next(self) -> list[_Entry]:
        first = self._waiting[0]
        return [entry for entry in self._waiting if entry.kind == first.kind][: self._size]

    def _tell_ahead(self) -> None:
        if self._running and self._waiting:
            self._ahead([entry.picture for entry in self._next()])
