"""Tests of training leave nothing behind in their process."""

from collections.abc import Iterator

import pytest
from accelerate.state import is_initialized

from diffusekrona.tuner.compat import forget_accelerator_state


@pytest.fixture(autouse=True)
def accelerators_forgotten() -> Iterator[None]:
    """Let no accelerator of a test be the one of the next, whose precision may be another."""
    before = is_initialized()
    yield
    if is_initialized() and not before:
        forget_accelerator_state()
