"""Progress bars of the commands, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from .console import errors

if TYPE_CHECKING:
    from ..training import TrainingStep


@contextmanager
def progress(title: str, *columns: ProgressColumn, **fields: Any) -> Iterator[Callable[..., None]]:
    """A bar that appears with its first update, so that an earlier error stands alone, and stops once it is full."""
    bar = Progress(TextColumn(title), BarColumn(None), *columns, TimeRemainingColumn(), console=errors)
    task = bar.add_task("", **fields)

    def update(**values: Any) -> None:
        bar.start()
        bar.update(task, **values)
        if bar.finished:
            bar.stop()

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def training_progress() -> Iterator[Callable[[TrainingStep], None]]:
    """A bar for `train_dreambooth`'s `on_step`: steps, recent loss, learning rate, speed, and time left."""
    columns = (MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TextColumn("left"))
    with progress("Training", *columns, total=None, status="") as show:
        yield lambda done: show(
            completed=done.step,
            total=done.steps,
            status=f"loss {done.average:.4f} lr {done.learning_rate:.1e} {done.images_per_second:.3g} images/s",
        )


@contextmanager
def class_images_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar for `run`'s `on_class_image`: how many class images there are, and time left."""
    with progress("Class images", MofNCompleteColumn(), TextColumn("left"), total=None) as show:
        yield lambda done, count: show(completed=done, total=count)


@contextmanager
def subjects_progress(
    count: int,
) -> Iterator[tuple[Callable[[str, TrainingStep], None], Callable[[str], None]]]:
    """A bar for `train_many`'s `on_step` and `on_end`: how many subjects are done, and how far the others are."""
    status: dict[str, str] = {}
    ended: list[str] = []
    columns = (MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TextColumn("left"))
    with progress("Subjects", *columns, total=None, status="") as show:

        def shown() -> None:
            show(completed=len(ended), total=count, status="  ".join(status.values()))

        def on_step(name: str, done: TrainingStep) -> None:
            status[name] = f"{name} {done.step}/{done.steps} loss {done.average:.4f}"
            shown()

        def on_end(name: str) -> None:
            status.pop(name, None)
            ended.append(name)
            shown()

        yield on_step, on_end
