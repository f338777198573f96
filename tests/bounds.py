"""Compare what is installed with the lower bounds of `pyproject.toml`; `make test-oldest` runs it before the tests.

A resolver that cannot have a bound takes a newer version without a word. Such a bound was never tested.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import metadata, requires, version

from packaging.requirements import Requirement
from packaging.version import Version


def untested(distribution: str) -> Iterator[str]:
    """A sentence for each requirement of an installed distribution that is not installed at its lower bound."""
    extras = ["", *(metadata(distribution).get_all("Provides-Extra") or [])]
    for requirement in map(Requirement, requires(distribution) or []):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        bounds = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        # A local label names the build, as in 2.7.0+cpu, and not another version.
        found = Version(Version(version(requirement.name)).public)
        if [found] != bounds:
            asked = f">={bounds[0]}" if bounds else "no lower bound"
            yield f"{requirement.name}: pyproject.toml says {asked}, and the oldest that fits all others is {found}."


if __name__ == "__main__":
    wrong = list(untested("diffusekrona"))
    if wrong:
        sys.exit("\n".join([*wrong, "Raise these bounds to what is installed, and run the tests with them."]))
