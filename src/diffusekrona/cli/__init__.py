"""The command `diffusekrona`. Each of its commands reads its options, calls the library, and prints what came of it.

No file of this room loads torch, Diffusers, transformers or PEFT before a command runs, so that `--help` and a wrong
flag are answered at once; their imports stand inside the commands.
"""

import typer

from . import evaluate, files, generate, params, runs, serve, train, train_many
from .commands import Commands, QuietCommand

__all__ = ["Commands", "app"]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Kronecker adapters (ΔW = A ⊗ B) for Stable Diffusion and SDXL: train one on a few images, use it.",
)
for _command in (
    train.train,
    train_many.train_many,
    runs.runs,
    runs.tell,
    generate.generate,
    serve.serve,
    evaluate.evaluate,
    params.params,
    files.export,
    files.inspect,
    files.convert,
    files.extract,
    files.merge,
):
    # Flags may be written with underscores, as in Diffusers' scripts.
    app.command(cls=QuietCommand, context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})(
        _command
    )
