"""Checkpoints of the paper authors' own code (github.com/IBM/DiffuseKronA).

It keeps Diffusers 0.21's names for LoRA (`lora.PROCESSOR_PARTS`), for example
`unet.….attn1.processor.to_q_lora.down.weight`. There, down holds Aᵀ (a2 × a1) and up holds B (b1 × b2); no alpha is
written, and the scale is 1. Its layer (`krona.py`, for three-dimensional inputs, which is what attention gives it)
computes

    y[k·a1 + i] = Σ_j Σ_l A[i, j] · B[k, l] · x[j·b2 + l],

so its ΔW is A ⊗ B with the rows in another order: the layout that `KronAConfig` calls "transposed".
"""

from __future__ import annotations

from .updates import KroneckerUpdate, LayerTensors


def read(layer: LayerTensors) -> KroneckerUpdate:
    """One layer of the authors' checkpoint. Any two matrices make one: only the weight tells whether they fit.

    Raises:
        AdapterFileError: a factor is missing, not a matrix or not finite; or there is an alpha, which the authors'
            code never writes.
    """
    if "alpha" in layer.parts:
        raise layer.error("holds up and down of different ranks and an alpha, which neither LoRA nor DiffuseKronA has")
    down, up = layer.matrix("down"), layer.matrix("up")
    return KroneckerUpdate(down.T, up, layout="transposed", kind="reference", **layer.common())
