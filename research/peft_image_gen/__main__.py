"""`python -m research.peft_image_gen`: our experiments in PEFT's image benchmark."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffusekrona.cli import Commands
from diffusekrona.cli.commands import QuietCommand
from diffusekrona.errors import KronAError

from .checkout import EXPERIMENTS, METHOD, Benchmark, find_benchmark, put_experiments

if TYPE_CHECKING:
    from .dry_run import Tried

console = Console()
app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Our experiments in PEFT's image benchmark.",
)

PEERS = ("lora/flux2-klein-default", "lokr/flux2-klein-lr1e-3")
"""The experiments of the benchmark that ours are to be read beside."""

Checkout = Annotated[Path, typer.Argument(help="A checkout of PEFT's repository.")]
Only = Annotated[
    list[str] | None, typer.Option("--run", show_default="all", help="An experiment of ours; may be repeated.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files of the checkout that differ from ours, and results.")
]


@app.command("count")
def count() -> None:
    """Count what our experiments train, beside LoRA and LoKr. Needs no checkout."""
    from . import counting

    _show(counting.table(counting.count_all()))


@app.command("copy")
def copy(checkout: Checkout, run: Only = None, overwrite: Overwrite = False) -> None:
    """Put our experiments into a checkout, and run nothing."""
    _copy(find_benchmark(checkout), _chosen(run), overwrite)


@app.command("run")
def run_all(checkout: Checkout, run: Only = None, overwrite: Overwrite = False) -> None:
    """Put our experiments into a checkout, run the benchmark for each, and show its rows beside LoRA's and LoKr's.

    The exit code is that of the first run that failed.
    """
    from . import needs, runs

    benchmark, names = find_benchmark(checkout), _chosen(run)
    _refuse_to_replace(benchmark, names, overwrite)
    needs.check_needs(benchmark, [benchmark.params(f"{METHOD}/{name}") for name in names])
    _copy(benchmark, names, overwrite)
    done = {name: runs.run_experiment(benchmark, f"{METHOD}/{name}") for name in names}
    published = [benchmark.folder / "results" / f"{peer.replace('/', '--')}.json" for peer in PEERS]
    rows = [one.result for one in done.values() if one.result is not None]
    _show(runs.table([*rows, *(runs.read_result(path) for path in published if path.is_file())]))
    for name, one in done.items():
        _say(f"{name}: {one.problem or f'written to {one.result and one.result.path}'}")
    sys.exit(next((one.exit_code for one in done.values() if one.exit_code), 0))


@app.command("dry-run", cls=QuietCommand)
def try_all(
    checkout: Checkout,
    output: Annotated[
        Path | None, typer.Option(show_default="a temporary folder", help="A new folder for all that is written.")
    ] = None,
) -> None:
    """Run our experiments, LoRA's and LoKr's through the benchmark's code on a tiny base, in a copy of its folder."""
    from . import dry_run

    benchmark = find_benchmark(checkout)
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            found = _tried(dry_run.dry_run(benchmark, Path(folder).resolve(), PEERS))
    else:
        if output.exists():
            raise KronAError(f"{output} exists; give a folder that does not.")
        found = _tried(dry_run.dry_run(benchmark, output.resolve(), PEERS))
    _show(dry_run.table(found))
    sys.exit(int(any(one.problem for one in found)))


def _chosen(names: list[str] | None) -> list[str]:
    if unknown := [name for name in names or () if name not in EXPERIMENTS]:
        raise KronAError(f"There is no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}.")
    return list(dict.fromkeys(names or EXPERIMENTS))


def _copy(benchmark: Benchmark, names: list[str], overwrite: bool) -> None:
    for path in put_experiments(benchmark, names, overwrite):
        _say(f"copied {path}")


def _refuse_to_replace(benchmark: Benchmark, names: list[str], overwrite: bool) -> None:
    """Only results of `main` have names without a time, which a second run would replace."""
    paths = [benchmark.folder / "results" / f"{METHOD}--{name}.json" for name in names]
    there = [str(path) for path in paths if path.exists()]
    if there and benchmark.branch == "main" and not overwrite:
        raise KronAError(f"The run would replace {', '.join(there)}. Move these away, or give --overwrite.")


def _tried(each: Iterator[Tried]) -> list[Tried]:
    found = []
    for one in each:
        _say(f"{one.experiment}: {one.problem or 'trained, saved and loaded'}")
        found.append(one)
    return found


def _show(table: Table) -> None:
    """Also where the output is no terminal, for which rich takes 80 columns."""
    Console(width=max(console.width, 120)).print(table)


def _say(text: str) -> None:
    console.print(escape(text), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
