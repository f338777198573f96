"""What a run tells of itself while it lasts, as a file of its folder that others may read at any time."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import KronAError
from .progress import TrainingStep

_log = logging.getLogger(__name__)

STATUS = "status.json"
"""The file, in a run's folder."""

State = Literal["waiting", "running", "paused", "finished", "failed", "stopped", "killed"]
"""What a run may be doing. It waits until its first step; "killed" is nothing that a run writes itself."""

ALIVE = ("waiting", "running", "paused")
"""States in which there is a process."""

EVERY = 1.0
"""Seconds between two writes, at the least."""

SHARE = 0.01
"""Of a run's time that writing may take."""

POINTS = 400
"""Of the course of the loss, at the most."""


@dataclass(frozen=True)
class Status:
    """What a run is doing.

    Attributes:
        state: waiting, running, paused, finished, failed, stopped or killed.
        step: how many are done.
        steps: how many there will be.
        loss: of the last step; None before the first one, and where it was skipped.
        average: of the last 50 steps.
        rate: learning rate of the last step.
        seconds: since the first step of this part of the run.
        images_per_second: in that time.
        left: seconds until the last step, as fast as till now; None before the first one.
        curve: some steps, and the average loss after each.
        validation_losses: of the held-out images, by step.
        error: why it failed, a sentence.
        pid: of the process.
        began: when the process did, in seconds since 1970, by which another of the same number is told from it.
        host: the machine's name.
        written: when this was, in seconds since 1970.
    """

    state: State
    step: int = 0
    steps: int = 0
    loss: float | None = None
    average: float | None = None
    rate: float | None = None
    seconds: float = 0.0
    images_per_second: float | None = None
    left: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    validation_losses: dict[int, float] = field(default_factory=dict)
    error: str | None = None
    pid: int = 0
    began: float = 0.0
    host: str = ""
    written: float = 0.0

    @property
    def is_alive(self) -> bool:
        """Whether there is a process to be told things."""
        return self.state in ALIVE


class StatusWriter:
    """Writes a run's status, at most once a second. What cannot be written is told once, and costs the run nothing.

    Args:
        folder: of the run.
        steps: how many there will be.
        go_on: whether the run goes on from an earlier one in the folder, whose course is kept.
    """

    def __init__(self, folder: Path, steps: int, go_on: bool = False) -> None:
        self._file, self._next, self._failed = folder / STATUS, 0.0, False
        self._taken, self._stride, pid = 0, 1, os.getpid()
        before = read_status(folder) if go_on else None
        self._now = Status("waiting", steps=steps, pid=pid, began=_began(pid), host=socket.gethostname())
        if before is not None:
            self._now = replace(
                self._now, step=before.step, curve=before.curve, validation_losses=before.validation_losses
            )
        self.tell("waiting")

    def step(self, done: TrainingStep) -> None:
        """Take down what is known after a step, and write it where the last write is long enough ago."""
        now = self._now
        first = now.state == "waiting"
        if first:  # a run that goes on may have begun earlier than the one before it ended
            now.curve[:] = [point for point in now.curve if point[0] < done.step]
            for step in [step for step in now.validation_losses if step >= done.step]:
                del now.validation_losses[step]
        self._taken += 1
        if done.validation_loss is not None:
            now.validation_losses[done.step] = done.validation_loss
        if done.step % self._stride == 0 and math.isfinite(done.average):
            now.curve.append((done.step, done.average))
            while len(now.curve) > POINTS:
                self._stride *= 2
                now.curve[:] = now.curve[1::2]
        self._now = replace(
            now,
            state="running",
            step=done.step,
            steps=done.steps,
            loss=_number(done.loss),
            average=_number(done.average),
            rate=done.learning_rate,
            seconds=done.seconds,
            images_per_second=done.images_per_second,
            left=(done.steps - done.step) * done.seconds / self._taken,
        )
        if first or done.step == done.steps or time.monotonic() >= self._next:
            self._write()

    def tell(self, state: State, error: str | None = None) -> None:
        """Write a state at once."""
        self._now = replace(self._now, state=state, error=error)
        self._write()

    def _write(self) -> None:
        before = time.monotonic()
        try:
            replace_file(self._file, json.dumps(asdict(replace(self._now, written=time.time()))))
        except OSError as error:
            if not self._failed:
                _log.warning("The run's status could not be written; the training goes on without: %s", error)
            self._failed = True
        after = time.monotonic()
        # On a slow disk less often, so that it never takes more than its share.
        self._next = after + max(EVERY, (after - before) / SHARE)


@contextmanager
def ended_in(status: StatusWriter | None) -> Iterator[None]:
    """Tell how the block ended: finished, stopped by the user, or failed."""
    if status is None:
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        status.tell("stopped")
        raise
    except BaseException as error:
        status.tell("failed", str(error) or type(error).__name__)
        raise
    status.tell("finished")


def replace_file(path: Path, text: str) -> None:
    """Write a small file that readers see as it was or as it is; unlike `write_whole` without waiting for the disk.

    After a power failure it may be gone or empty, which costs nothing: then no run is under way either.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


# What others read


def run_folder(path: Path) -> Path:
    """The folder of a run that has a status, from that folder, the output's, or the output's file.

    Raises:
        KronAError: there is none.
    """
    path = path.expanduser()
    for folder in (path, path / "run", path.with_suffix("") / "run"):
        if (folder / STATUS).is_file():
            return folder
    raise KronAError(f"{path} is no run: there is no {STATUS}. Name the folder that its output_dir was.")


def read_status(folder: Path) -> Status | None:
    """A run's status, which is "killed" where its process is gone; None where there is none that can be read."""
    try:
        found = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        status = _status(found)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    if status.is_alive and status.host == socket.gethostname() and not _is_running(status):
        return replace(status, state="killed", left=None)
    return status


def _status(found: Mapping[str, Any]) -> Status:
    """From a file's values, of which unknown ones are those of a later version."""
    known = {field.name for field in fields(Status)}
    values = {name: value for name, value in found.items() if name in known}
    values["curve"] = [(int(step), float(loss)) for step, loss in values["curve"]]
    values["validation_losses"] = {int(step): float(loss) for step, loss in values["validation_losses"].items()}
    return Status(**values)


def runs_in(folder: Path) -> list[tuple[Path, Status]]:
    """All runs below a folder and how they are, in the order of their names."""
    return [(path, status) for path in _run_folders(folder) if (status := read_status(path)) is not None]


def _run_folders(folder: Path) -> Iterable[Path]:
    """Folders with a status. Nothing within a run, and nothing hidden, is looked into."""
    for place, inside, files in os.walk(folder):
        inside[:] = [] if STATUS in files else sorted(name for name in inside if not name.startswith("."))
        if STATUS in files:
            yield Path(place)


def run_name(run: Path, folder: Path) -> str:
    """What a run is called beside others below a folder: its output's path."""
    output = run.parent if run.name == "run" else run
    with suppress(ValueError):
        name = output.absolute().resolve().relative_to(folder.absolute().resolve()).as_posix()
        return name if name != "." else output.absolute().resolve().name
    return str(output)


def _is_running(status: Status) -> bool:
    import psutil  # which takes 20 ms: only where a run is looked at

    try:
        process = psutil.Process(status.pid)
        # Clocks are set anew now and then, so that the same process may seem to have begun a moment earlier.
        same = abs(float(process.create_time()) - status.began) < 60
        return same and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _began(pid: int) -> float:
    import psutil

    return float(psutil.Process(pid).create_time())


def _number(value: float) -> float | None:
    """A number as JSON has it."""
    return value if math.isfinite(value) else None
