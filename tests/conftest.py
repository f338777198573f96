"""What all tests share.

Hypothesis without clocks: these tests share their cores, and a slow machine is no failure. Full precision of products,
which torchao below 0.17 turns off for the whole process as it quantizes.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("local", deadline=None, suppress_health_check=quiet)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def products_in_full_precision() -> Iterator[None]:
    """Undo what a test, or a library in it, sets for all products."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
