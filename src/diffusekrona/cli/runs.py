"""`diffusekrona runs` and `tell`: what runs are doing, and asking them for something."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..training.requests import Request, What, ask
from ..training.status import run_folder, run_name, runs_in
from .console import console, print_line

if TYPE_CHECKING:
    from ..training.status import Status


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder whose runs are listed, with those of its subfolders.")] = Path(
        "."
    ),
) -> None:
    """List runs: how far each is, its loss, and whether it waits, runs, is paused, or how it ended."""
    found = runs_in(folder)
    if not found:
        print_line(f"There is no run in {folder.absolute().resolve()}.")
        return
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold")
    for header in ("step", "loss", "left"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for path, status in found:
        loss = "–" if status.average is None else f"{status.average:.4f}"
        name = escape(run_name(path, folder))
        table.add_row(name, f"{status.step}/{status.steps}", loss, _left(status), status.state)
    console.print(table)
    for path, status in found:
        if status.error is not None:
            print_line(f"{run_name(path, folder)}: {status.error}")


def _left(status: Status) -> str:
    """Time until the last step of a run that is running."""
    if status.left is None or status.state != "running":
        return "–"
    minutes, seconds = divmod(round(status.left), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


_SAID = {
    "sample": "draws pictures",
    "save": "saves its adapter",
    "pause": "waits",
    "resume": "goes on",
    "stop": "stops, with its state and its adapter saved,",
}


def tell(
    run: Annotated[Path, typer.Argument(help="Run to ask: the folder or the file that its output is.")],
    what: Annotated[
        What,
        typer.Argument(
            help="What to ask for: pictures (sample), the adapter as a file (save), to wait (pause) and to go on "
            "(resume), or to stop as by Ctrl-C (stop)."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(show_default="the validation prompts", help="Prompt of a picture to draw, for sample.")
    ] = None,
) -> None:
    """Ask a run for pictures, for its adapter as a file, to wait, to go on, or to stop."""
    ask(run_folder(run), Request(what, prompt))
    when = "at once" if what == "resume" else "after the step under way"
    print_line(f"Asked {run}: it {_SAID[what]} {when}.")
