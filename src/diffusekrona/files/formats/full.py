"""Whole updates, as LyCORIS and ComfyUI read and write them.

`<layer>.diff` is ΔW itself and `<layer>.diff_b` what the bias changes by, of any layer that has them; LyCORIS'
`train_norm` calls them `<layer>.w_norm` and `<layer>.b_norm` in norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import AdapterFileError
from .updates import LayerTensors, Update

PARTS = {".diff": "diff", ".w_norm": "diff"}
"""End of a tensor's name → part."""


@dataclass(frozen=True, eq=False)
class Full(Update):
    """ΔW.

    Attributes:
        diff: in the shape of the weight; None where only the bias changes.
    """

    diff: Tensor | None

    @property
    def bias_only(self) -> bool:
        """Whether the weight stays as it is."""
        return self.diff is None

    @property
    def of_norm(self) -> bool:
        """Whether it is for the weight of a norm, or for nothing but a bias."""
        return self.diff is None or self.diff.dim() == 1

    @property
    def shape(self) -> torch.Size | None:
        """The weight's; None where only the bias changes."""
        return None if self.diff is None else self.diff.shape

    def delta(self) -> Tensor:
        """ΔW in fp32.

        Raises:
            AdapterFileError: only the bias changes.
        """
        if self.diff is None:
            raise AdapterFileError(f"{self.where} changes the bias only.")
        return self.diff.float()


def read(layer: LayerTensors) -> Full:
    """One layer's ΔW. An alpha says nothing about it.

    Raises:
        AdapterFileError: it is not finite.
    """
    if "diff" in layer.parts or "bias" not in layer.parts:
        layer.matrix("diff", (1, 2, 3, 4, 5))
    return Full(layer.parts.get("diff"), kind="full", **layer.common())
