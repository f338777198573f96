"""What a check of another program prints, and how it ends."""

from dataclasses import dataclass
from importlib.metadata import version

__all__ = ["Report", "version"]


@dataclass
class Report:
    """PASS or FAIL for each item, and whether all passed.

    Attributes:
        program: name and versions.
    """

    program: str
    items: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        print(f"{self.program}, with diffusekrona {version('diffusekrona')}", flush=True)

    def item(self, what: str, passed: bool, found: str) -> None:
        """Print one item, with what was found."""
        self.items += 1
        self.failed += not passed
        print(f"{'PASS' if passed else 'FAIL'}  {what} ({found})", flush=True)

    def end(self) -> int:
        """Print the sum and return the exit status."""
        print(f"{self.program}: {self.items - self.failed} of {self.items} passed", flush=True)
        return 1 if self.failed else 0
