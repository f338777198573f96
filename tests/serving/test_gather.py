"""Gathering: what goes together, how long it waits, and what happens to those who leave. Nothing is drawn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from diffusekrona.serving.gather import Gatherer, Outcome
from diffusekrona.serving.picture import Picture, Refusal


class Easel:
    """Notes batches; each is held until it is let go."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.ahead: list[list[int]] = []
        self.stopped = 0
        self.go = threading.Event()
        if not held:
            self.go.set()

    def draw(self, pictures: Sequence[Picture], abandoned: Callable[[], bool]) -> list[Outcome]:
        self.batches.append([picture.seed for picture in pictures])
        for _ in range(6000):
            if self.go.wait(0.01):
                break
            if abandoned():
                self.stopped += 1
                return [Refusal(499, "")] * len(pictures)
        if any(picture.prompt == "breaks" for picture in pictures):
            raise RuntimeError("broken")
        return [bytes([picture.seed]) for picture in pictures]

    def note(self, pictures: Sequence[Picture]) -> None:
        self.ahead.append([picture.seed for picture in pictures])


def gatherer(easel: Easel, **more: Any) -> Gatherer:
    return Gatherer(easel.draw, **{"size": 4, "wait": 0.05, "most": 8, "ahead": easel.note} | more)


async def ask(one: Gatherer, seed: int, kind: str = "", timeout: float = 60, prompt: str = "") -> Outcome:
    return await one.drawn(Picture(None, prompt, seed), kind, timeout)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 120))


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def test_those_of_a_kind_go_together_and_each_has_its_own() -> None:
    easel = Easel()

    async def act() -> list[Outcome]:
        one = gatherer(easel)
        return await asyncio.gather(*(ask(one, seed, "even" if seed % 2 == 0 else "odd") for seed in range(8)))

    assert run(act()) == [bytes([seed]) for seed in range(8)]
    assert easel.batches == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_full_batch_does_not_wait_and_another_waits_no_longer_than_it_may() -> None:
    easel = Easel()

    async def act() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        one, started = gatherer(easel, wait=30), loop.time()
        await asyncio.gather(*(ask(one, seed) for seed in range(4)))
        full = loop.time() - started
        two, started = gatherer(easel, wait=0.2), loop.time()
        await ask(two, 9)
        return full, loop.time() - started

    full, waited = run(act())
    assert full < 20
    assert 0.2 <= waited < 20
    assert easel.batches == [[0, 1, 2, 3], [9]]


def test_who_comes_while_it_waits_goes_along_and_who_comes_later_is_next() -> None:
    easel = Easel(held=True)

    async def act() -> None:
        one = gatherer(easel, wait=0.5)
        first = [asyncio.ensure_future(ask(one, seed)) for seed in (0, 1)]
        await asyncio.sleep(0.05)
        first.append(asyncio.ensure_future(ask(one, 2)))
        await until(lambda: bool(easel.batches))
        later = [asyncio.ensure_future(ask(one, seed)) for seed in (3, 4)]
        await asyncio.sleep(0.05)
        easel.go.set()
        await asyncio.gather(*first, *later)

    run(act())
    assert easel.batches == [[0, 1, 2], [3, 4]]
    assert easel.ahead[-1] == [3, 4]


def test_beyond_the_queue_they_are_refused() -> None:
    easel = Easel(held=True)

    async def act() -> list[Outcome]:
        one = gatherer(easel, size=1, wait=0, most=2)
        running = asyncio.ensure_future(ask(one, 0))
        await until(lambda: bool(easel.batches))
        asked = [asyncio.ensure_future(ask(one, seed)) for seed in (1, 2, 3)]
        await asyncio.sleep(0.05)
        easel.go.set()
        return await asyncio.gather(running, *asked)

    *drawn, refused = run(act())
    assert drawn == [b"\0", b"\1", b"\2"]
    assert isinstance(refused, Refusal)
    assert (refused.status, refused.code) == (429, "queue_full")


def test_who_leaves_the_queue_frees_its_place_and_is_not_drawn() -> None:
    easel = Easel(held=True)

    async def act() -> list[Outcome]:
        one = gatherer(easel, size=2, wait=0, most=2)
        running = asyncio.ensure_future(ask(one, 0))
        await until(lambda: bool(easel.batches))
        leaving, staying = (asyncio.ensure_future(ask(one, seed)) for seed in (1, 2))
        await asyncio.sleep(0.02)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert one.waiting == 1
        other = asyncio.ensure_future(ask(one, 3))
        await asyncio.sleep(0.02)
        easel.go.set()
        return await asyncio.gather(running, staying, other)

    assert run(act()) == [b"\0", b"\2", b"\3"]
    assert easel.batches == [[0], [2, 3]]


def test_a_batch_that_nobody_waits_for_ends_and_others_go_on() -> None:
    easel = Easel(held=True)

    async def act() -> Outcome:
        one = gatherer(easel, size=2, wait=0.02)
        leaving = [asyncio.ensure_future(ask(one, seed)) for seed in (0, 1)]
        await until(lambda: bool(easel.batches))
        next_one = asyncio.ensure_future(ask(one, 2))
        leaving[0].cancel()
        await asyncio.sleep(0.1)
        assert easel.stopped == 0  # someone waits still
        leaving[1].cancel()
        await until(lambda: len(easel.batches) == 2)
        easel.go.set()
        return await next_one

    assert run(act()) == b"\2"
    assert easel.stopped == 1


def test_what_takes_too_long_is_ended_waiting_or_drawn() -> None:
    easel = Easel(held=True)

    async def act() -> list[Outcome]:
        one = gatherer(easel, size=1, wait=0)
        both = [asyncio.ensure_future(ask(one, seed, timeout=0.1)) for seed in (0, 1)]
        found = await asyncio.gather(*both)
        assert one.waiting == 0
        await until(lambda: easel.stopped == 1)
        easel.go.set()
        return [*found, await ask(one, 2)]

    *slow, quick = run(act())
    assert [(one.status, one.code) for one in slow] == [(504, "timeout")] * 2
    assert quick == b"\2"
    assert easel.batches == [[0], [2]]


def test_what_breaks_is_told_and_the_next_is_drawn(caplog: pytest.LogCaptureFixture) -> None:
    easel = Easel()

    async def act() -> list[Outcome]:
        one = gatherer(easel, wait=0)
        return [await ask(one, 0, prompt="breaks"), await ask(one, 1)]

    broken, drawn = run(act())
    assert (broken.status, broken.message) == (500, "The picture could not be drawn: RuntimeError.")
    assert drawn == b"\1"
    assert "A batch could not be drawn" in caplog.text
