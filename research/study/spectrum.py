"""Singular values of what training changed (Appendix E.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ENERGY = 0.9


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights of all linear layers of a model without adapters, d × h."""
    return {
        name: layer.weight.detach().clone() for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }


@torch.no_grad()
def updates(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ΔW of the layers that changed, d × h in float32. It is read off their outputs, so any method will do."""
    found = {}
    for name, weight in before.items():
        layer = model.get_submodule(name)
        unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        answer = layer(unit) - layer(torch.zeros_like(unit[:1]))
        change = answer.T.float() - weight.float()
        if float(change.abs().max()) > 1e-5 * float(weight.float().abs().max()):
            found[name] = change
    return found


def summary(changes: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the layers.

    Returns:
        `layers`, how many changed; `rank90`, how many singular values hold 90% of the energy (the sum of squares);
        `stable_rank`, the energy over the largest one's; `energy4`, the share of the four largest, as many as LoRA of
        rank 4 has; `norm`, of the whole update.
    """
    if not changes:
        return {"layers": 0.0}
    ranks, stable, four, energy = [], [], [], 0.0
    for change in changes.values():
        squares = torch.linalg.svdvals(change.double()).square()
        share = squares.cumsum(0) / squares.sum()
        ranks.append(float((share < ENERGY).sum()) + 1)
        stable.append(float(squares.sum() / squares[0]))
        four.append(float(share[min(3, len(share) - 1)]))
        energy += float(squares.sum())
    count = len(changes)
    return {
        "layers": float(count),
        "rank90": sum(ranks) / count,
        "stable_rank": sum(stable) / count,
        "energy4": sum(four) / count,
        "norm": energy**0.5,
    }
