"""What tells one base model from another, quickly, so that a run is not resumed on another base."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 8
"""Numbers that are looked at of each weight."""


def base_identity(pipe: Any) -> str:
    """A hash of a pipeline's scheduler, and of its models: their weights' names, shapes, types, and some numbers.

    It is the same on every device and for every place that a base is loaded from.
    """
    found = hashlib.sha256(type(pipe).__name__.encode())
    chosen = {name: value for name, value in dict(pipe.scheduler.config).items() if not name.startswith("_")}
    found.update(json.dumps(chosen, sort_keys=True, default=str).encode())
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            for name, weight in module.state_dict().items():
                found.update(f"{part}.{name}".encode())
                if isinstance(weight, Tensor):
                    found.update(repr((tuple(weight.shape), weight.dtype)).encode() + _sample(weight))
    return found.hexdigest()[:16]


def _sample(weight: Tensor) -> bytes:
    """Bytes of some numbers of a weight; of quantized ones and of those that are not there, none."""
    if type(weight) is not Tensor or weight.is_meta:
        return b""
    some = weight.flatten()[:: max(1, weight.numel() // SAMPLES)]
    content: bytes = some.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return content
