"""The paper's method and those that it is compared with, behind one interface: `Method`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from .in_place import CustomDiffusion, FullDreamBooth
from .krona import KronA
from .method import Method, MethodError, option_names
from .peft_method import LoHa, LoKr, LoRA
from .svdiff import SVDiff

__all__ = [
    "METHODS",
    "CustomDiffusion",
    "FullDreamBooth",
    "KronA",
    "LoHa",
    "LoKr",
    "LoRA",
    "Method",
    "MethodError",
    "SVDiff",
    "method_from",
]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (KronA, LoRA, LoKr, LoHa, FullDreamBooth, CustomDiffusion, SVDiff)
}
"""Name → method."""


def method_from(name: str, **options: Any) -> Method:
    """A method by its name, with these options and its defaults for the rest.

    Raises:
        MethodError: no method has the name, or it has no such option, or the option cannot have the value.
    """
    if name not in METHODS:
        raise MethodError(f"No method is named {name!r}{_near(name, METHODS)}")
    method = METHODS[name]
    known = option_names(method)
    for option in options:
        if option not in known:
            raise MethodError(f"{name} has no option {option!r}{_near(option, known)}")
    return method(**options)


def _near(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, list(known), n=2, cutoff=0.5)
    meant = f"; did you mean {' or '.join(near)}?" if near else "."
    return f"{meant} There are: {', '.join(known)}."
