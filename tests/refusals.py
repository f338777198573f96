"""The text of one of our errors, and what it names, for tests that do what it says."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from diffusekrona.errors import KronAError


def refusal(run: Callable[..., Any], *parts: Any, **named: Any) -> str:
    """The text of the error that a call ends with."""
    with pytest.raises(KronAError) as caught:
        run(*parts, **named)
    return str(caught.value)


def choices(text: str, before: str) -> list[str]:
    """The names that a text lists after some words, up to "not" or a full stop."""
    found = re.search(rf"{before} ([\w, +'-]+?)(?:,? not |\.$)", text)
    assert found, text
    return [name.strip(" '") for name in found[1].split(",")]
