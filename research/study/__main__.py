"""`python -m research.study NAME`: a command for each study, and one for the tables of counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn
from rich.table import Table

from diffusekrona.bases.loading import default_device
from diffusekrona.cli import Commands
from diffusekrona.cli.progress import progress

from .paper_tables import rows_of
from .parameter_counts import counted, rich_table, write_markdown
from .run import chosen_study, plan_study, quick, run_study
from .settings import read_study_settings
from .studies import STUDIES
from .study import Study

console = Console()
app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="What the paper measured, measured again.",
)

Config = Annotated[Path, typer.Option(help="YAML file of the base, the subjects and the prompts.")]
Output = Annotated[Path, typer.Option(help="Folder of the measurements, and of pages and figures.")]
Workers = Annotated[
    int | None, typer.Option(min=1, show_default="one for each core, one with a GPU", help="Processes.")
]
Seeds = Annotated[int | None, typer.Option(min=1, show_default="the study's own", help="Trainings of each arm.")]


@app.command("tables")
def tables(
    table: Annotated[int | None, typer.Option(show_default="all", help="Just this one: 2, 4, 6, 7 or 8.")] = None,
    output: Annotated[Path | None, typer.Option(show_default="none", help="A Markdown file to write.")] = None,
) -> None:
    """Count what each method trains, beside the counts that the paper prints, and say where they differ and why."""
    rows = counted(rows_of(table))
    console.print(rich_table(rows))
    if output is not None:
        write_markdown(rows, output)
        console.print(escape(str(output)), soft_wrap=True)


def _add(kind: type[Study]) -> None:
    def command(
        config: Config = Path("studies/emoji.yaml"),
        output: Output = Path("studies/results"),
        workers: Workers = None,
        seeds: Seeds = None,
        quick_form: Annotated[
            bool,
            typer.Option("--quick", help="A few steps and pictures, to see that it runs; its numbers say nothing."),
        ] = False,
        plan: Annotated[bool, typer.Option("--plan", help="Say what would be measured, and load nothing.")] = False,
    ) -> None:
        settings = read_study_settings(config)
        if quick_form:
            settings, output = quick(settings), output / "quick"
        study = chosen_study(kind.name, settings, seeds)
        if plan:
            table = Table(box=None, show_header=False, pad_edge=False)
            for name, value in plan_study(study, settings, output).items():
                table.add_row(name, value)
            console.print(table)
            return
        with progress("Measuring", MofNCompleteColumn(), total=None) as show:
            page = run_study(
                study,
                settings,
                output,
                workers=workers or default_workers(),
                on_record=lambda done, total: show(completed=done, total=total),
            )
        console.print(escape(str(page)), soft_wrap=True)

    app.command(kind.name, help=f"The paper: {kind.question}")(command)


def default_workers() -> int:
    """A process for each core; one where there is a GPU, which several would share."""
    return 1 if default_device().type != "cpu" else os.cpu_count() or 1


for _kind in STUDIES.values():
    _add(_kind)


if __name__ == "__main__":
    app()
