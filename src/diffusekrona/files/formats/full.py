"""Whole updates, as LyCORIS and ComfyUI read and write them: `<layer>.diff` is ΔW itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .updates import LayerTensors, Update

PARTS = {".diff": "diff"}
"""End of a tensor's name → part."""


@dataclass(frozen=True, eq=False)
class Full(Update):
    """ΔW, in the shape of the weight."""

    diff: Tensor

    def delta(self) -> Tensor:
        """ΔW in fp32."""
        return self.diff.float()


def read(layer: LayerTensors) -> Full:
    """One layer's ΔW. An alpha says nothing about it.

    Raises:
        AdapterFileError: it is not finite.
    """
    layer.matrix("diff", (1, 2, 3, 4, 5))
    return Full(layer.parts["diff"], kind="full", **layer.common())
