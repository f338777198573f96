"""`python -m research.demo`: teach the repository's small base model a new subject, and measure what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from diffusekrona.cli import Commands
from diffusekrona.cli.progress import training_progress

from .personalise import DemoPaths, run_demo
from .result import rich_table

console = Console()
app = typer.Typer(cls=Commands, pretty_exceptions_show_locals=False)


@app.command()
def demo(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")] = DemoPaths.base,
    judge: Annotated[Path, typer.Option(help="Folder of the classifier.")] = DemoPaths.judge,
    subject: Annotated[Path, typer.Option(help="Folder of the subject's pictures.")] = DemoPaths.subject,
    output: Annotated[Path, typer.Option(help="Folder for the adapter and the pictures.")] = DemoPaths.output,
) -> None:
    """Teach the repository's small base model a new subject; save, reload, merge, generate and measure."""
    with training_progress() as on_step:
        result = run_demo(DemoPaths(base, judge, subject, output), on_step=on_step, on_stage=console.print)
    console.print(rich_table(result))
    console.print(escape(str(result.picture)), soft_wrap=True)


if __name__ == "__main__":
    app()
