"""The commands' consoles: standard output, and standard error for errors and progress bars."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


def print_line(text: str) -> None:
    """Print a line unchanged: it is not wrapped, and brackets in it are no markup."""
    console.print(escape(text), soft_wrap=True)
