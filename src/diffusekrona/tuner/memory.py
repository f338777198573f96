"""Whether there is memory for copies of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from .layer import KronALayer
from .quantized import is_quantized


def has_room_for_copies(layers: Iterable[KronALayer]) -> bool:
    """Whether every device has twice the memory that copies of these layers' weights would take there.

    Quantized weights do not count, since what they were is kept in any case.
    """
    needed: Counter[torch.device] = Counter()
    for layer in layers:
        base = layer.get_base_layer()
        if not is_quantized(base):
            weight = base.weight
            assert isinstance(weight, Tensor)
            needed[weight.device] += weight.nbytes
    return all(2 * size <= available_memory(device) for device, size in needed.items())


def available_memory(device: torch.device) -> int:
    """Bytes that a device could still give; 0 for one that is unknown, or is none, such as "meta"."""
    from accelerate.utils import get_max_memory  # which asks for every device

    known = get_max_memory()  # by number, but for "cpu" and "mps"
    found: int = known.get(device.type, known.get(device.index, 0))
    return found
