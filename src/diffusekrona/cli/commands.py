"""How commands run and end."""

from __future__ import annotations

from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from ..errors import KronAError, TrainingInterrupted
from ..training.script_names import answer
from .console import errors


class Commands(TyperGroup):
    """Commands that end with one line instead of a traceback where the user can mend the cause."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; exit code 1 for an error of ours or of the system, 130 for Ctrl-C."""
        try:
            return super().invoke(ctx)
        except (KronAError, OSError) as error:
            errors.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            errors.print(escape(_stopped(interrupt)), soft_wrap=True, highlight=False)
            raise typer.Exit(130) from interrupt


def _stopped(interrupt: KeyboardInterrupt) -> str:
    if not isinstance(interrupt, TrainingInterrupted) or interrupt.checkpoint is None:
        return "Stopped before the end."
    from ..training.run import train_command

    again = train_command(interrupt.checkpoint.parents[1], resume=True)
    adapter = f" The adapter so far is {interrupt.adapter}." if interrupt.adapter is not None else ""
    return f"{interrupt}{adapter} Its state is in {interrupt.checkpoint}. To go on from there:\n{again}"


class QuietCommand(TyperCommand):
    """A command during which Diffusers and transformers print errors only, and no progress bars."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read the flags; where one is of Diffusers' scripts and not ours, say what to use."""
        given = list(args)  # which reading them empties
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # typer does not show the class of this error.
            told, name = getattr(error, "message", ""), getattr(error, "option_name", None)
            if name and (said := answer(name)):
                error.message, error.possibilities = f"{told}.{said}", None  # type: ignore[attr-defined]
            elif "unexpected extra argument" in told and any(one.replace("_", "-") == "--push-to-hub" for one in given):
                error.message = f"{told}. --push-to-hub takes no value; name the repository with --hub-model-id."  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        import diffusers
        import transformers

        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        return super().invoke(ctx)
