"""Public names of a package that are loaded at their first use (PEP 562), so that importing the package is cheap."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any


def loaded_at_first_use(package: str, names: Collection[str], *homes: str) -> Callable[[str], Any]:
    """A package's `__getattr__`.

    Args:
        package: dotted name of the package.
        names: its public names.
        homes: the modules that hold them, relative to the package. They are tried in this order, so the lightest come
            first.
    """

    def __getattr__(name: str) -> Any:
        if name in names:
            for home in homes:
                module = import_module(home, package)
                if hasattr(module, name):
                    setattr(sys.modules[package], name, getattr(module, name))
                    return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
