"""Progress bars of the commands, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .training import TrainingStep

errors = Console(stderr=True)


@contextmanager
def progress(title: str, *columns: ProgressColumn, **fields: Any) -> Iterator[Callable[..., None]]:
    """A bar that its first update shows, so that an error before that stands alone."""
    bar = Progress(TextColumn(title), BarColumn(), *columns, TimeRemainingColumn(), console=errors)
    task = bar.add_task("", start=False, **fields)

    def update(**values: Any) -> None:
        bar.start()
        bar.start_task(task)
        bar.update(task, **values)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def training_progress(steps: int) -> Iterator[Callable[[TrainingStep], None]]:
    """A bar for `train_dreambooth`'s `on_step`: steps, recent loss, time gone and time left."""
    columns = (MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), TextColumn("left"))
    with progress("Training", *columns, total=steps, loss="") as show:
        yield lambda done: show(completed=done.step, loss=f"{done.average:.4f}")
