"""Checkpoints of the paper authors' own code (github.com/IBM/DiffuseKronA).

It keeps Diffusers 0.21's names for LoRA (`lora.PROCESSOR_PARTS`), for example
`unet.….attn1.processor.to_q_lora.down.weight`. There, down holds Aᵀ (a2 × a1) and up holds B (b1 × b2); no alpha is
written, and the scale is 1. Its layer (`krona.py`, for three-dimensional inputs, which is what attention gives it)
computes

    y[k·a1 + i] = Σ_j Σ_l A[i, j] · B[k, l] · x[j·b2 + l],

so its ΔW is A ⊗ B with the rows in another order: the layout that `KronAConfig` calls "transposed".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .updates import LayerTensors, Update


@dataclass(frozen=True, eq=False)
class Reference(Update):
    """ΔW[k·a1 + i, j·b2 + l] = A[i, j] · B[k, l].

    Attributes:
        A: a1 × a2, fp32.
        B: b1 × b2, fp32.
    """

    kind: ClassVar[str] = "reference"
    A: Tensor
    B: Tensor

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A, B and s = 1 for the layout "transposed"."""
        return self.A, self.B, 1.0

    def delta(self) -> Tensor:
        """ΔW: d × h."""
        (a1, a2), (b1, b2) = self.A.shape, self.B.shape
        return torch.einsum("ij,kl->kijl", self.A, self.B).reshape(b1 * a1, a2 * b2)


def read(layer: LayerTensors) -> Reference:
    """One layer of the authors' checkpoint. Any two matrices make one: only the weight tells whether they fit.

    Raises:
        AdapterFileError: a factor is missing, not a matrix or not finite; or there is an alpha, which the authors'
            code never writes.
    """
    if "alpha" in layer.parts:
        raise layer.error("holds up and down of different ranks and an alpha, which neither LoRA nor DiffuseKronA has")
    down, up = layer.matrix("down"), layer.matrix("up")
    return Reference(down.T, up, **layer.common())
