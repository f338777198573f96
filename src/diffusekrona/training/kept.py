"""How much a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


class Kept:
    """What is kept for the backward pass: each memory once, and modules' own weights not."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._own = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
        self._seen: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor."""
        if tensor.untyped_storage()._cdata not in self._own:
            self._seen[tensor.untyped_storage()._cdata] = tensor  # which keeps the number from being given anew
        return tensor

    def forget(self) -> None:
        """Let go of all that was counted."""
        self._seen.clear()

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())

    def counting(self) -> AbstractContextManager[Any]:
        """Count all that autograd keeps meanwhile."""
        return torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
