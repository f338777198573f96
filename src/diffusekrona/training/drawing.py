"""A pipeline in training that draws in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .runtime import modes_kept


@contextmanager
def ready_to_draw(pipe: Any, device: torch.device | None = None) -> Iterator[None]:
    """All of a pipeline's models on one device and without dropout; afterwards where and as they were.

    Args:
        pipe: some of its models may be elsewhere, such as encoders that have done their work.
        device: where to draw; by default where the first model is that is not on the CPU.
    """
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    homes = [(module, next(module.parameters()).device) for module in modules]
    elsewhere = (home for _, home in homes if home.type != "cpu")
    with modes_kept(modules):
        for module in modules:
            module.eval()
        pipe.to(device or next(elsewhere, torch.device("cpu")))
        try:
            yield
        finally:
            for module, home in homes:
                module.to(home)
