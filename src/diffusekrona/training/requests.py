"""What a run is asked for by others while it lasts: small files in its folder `requests`, which it takes away."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

from ..errors import KronAError
from .status import State, read_status, replace_file

What = Literal["sample", "save", "pause", "resume", "stop"]
"""What can be asked for: pictures, the adapter as a file, to wait, to go on, and what Ctrl-C does."""

LARGEST = 1 << 16
"""Bytes of a request that are read."""

PAUSE = 0.2
"""Seconds between two looks of a run that waits."""


class Request(NamedTuple):
    """What a run is asked for.

    Attributes:
        what: of the five.
        prompt: to draw in place of the validation prompts; None for these.
    """

    what: What
    prompt: str | None = None


def ask(run: Path, request: Request) -> None:
    """Ask a run for something; it is done after the step under way, or after the first one.

    Args:
        run: its folder, which has its status.
        request: what for.

    Raises:
        KronAError: there is no such run, or no process of it.
    """
    status = read_status(run)
    if status is None or not status.is_alive:
        state = "no run" if status is None else status.state
        again = " Go on with it by `diffusekrona train --resume`." if state in ("killed", "stopped") else ""
        raise KronAError(f"{run} cannot be asked to {request.what}: it is {state}.{again}")
    if request.prompt is not None and request.what != "sample":
        raise KronAError(f"A prompt is for sample, not for {request.what}. Leave it out.")
    # By their names in the order in which they were asked, also where two ask at once.
    name = f"{time.time_ns():020d}-{os.getpid()}-{request.what}.json"
    replace_file(run / "requests" / name, json.dumps(request._asdict()))


class Requests:
    """What a run is asked for, from its first step on; what an earlier run was asked for is forgotten.

    Args:
        run: its folder.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / "requests"
        for _ in self._taken():
            pass

    def due(self, tell: Callable[[State], None], interrupted: Callable[[], bool]) -> Iterator[Request]:
        """Each request of now, but for those to wait and to go on, between which this waits.

        Args:
            tell: called with "paused" when the run begins to wait, and with "running" when it goes on.
            interrupted: whether it was asked to stop in another way, so that it shall not wait.
        """
        waiting = False
        while True:
            for request in self._taken():
                if request.what in ("pause", "resume"):
                    if waiting != (request.what == "pause"):
                        waiting = not waiting
                        tell("paused" if waiting else "running")
                else:
                    yield request
            if waiting and interrupted():
                tell("running")
                return
            if not waiting:
                return
            time.sleep(PAUSE)

    def _taken(self) -> Iterator[Request]:
        """Those that are there, each taken away before it is done, so that none is done twice."""
        try:
            names = sorted(name for name in os.listdir(self._folder) if name.endswith(".json") and name[0] != ".")
        except OSError:  # there is no such folder until something is asked for
            return
        for name in names:
            request = _read(self._folder / name)
            try:
                (self._folder / name).unlink()
            except OSError:  # which would be done again after each step
                continue
            if request is not None:
                yield request


def _read(file: Path) -> Request | None:
    """A request; None for a file that is none."""
    try:
        with file.open("rb") as opened:
            values = json.loads(opened.read(LARGEST))
        what, prompt = values["what"], values.get("prompt")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if what not in get_args(What) or not isinstance(prompt, str | None):
        return None
    return Request(cast(What, what), prompt)
