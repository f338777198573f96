"""What the commands print to: standard output, and standard error for errors and progress bars."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


def print_line(text: str) -> None:
    """Print a line as it is, however long it is and whatever brackets it holds."""
    console.print(escape(text), soft_wrap=True)
