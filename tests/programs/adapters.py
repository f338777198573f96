"""Adapters with random factors for models that hold no weights, and the updates that they stand for."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from diffusekrona import KronAConfig
from diffusekrona.files.formats.krona import SavedAdapter
from diffusekrona.tuner.targets import layer_shapes

SCALE = 0.7
ATTENTION = r".*\b(attn\d?|attention|self_attn|cross_attn|SelfAttention)\..*"
ALL = ".*"


def adapter(module: nn.Module, layers: str = ALL, a1: int = 2, a2: int = 2, **fields: Any) -> SavedAdapter:
    """Factors of size one for the linear layers and convolutions whose names match `layers`.

    Args:
        module: the model, which may be on the meta device.
        layers: matches the whole of their names.
        a1: rows of A, for every layer.
        a2: columns of A.
        fields: more of the config.
    """
    names = [
        name
        for name, layer in module.named_modules()
        if re.fullmatch(layers, name) and isinstance(layer, nn.Linear | nn.Conv2d) and _divisible(layer, a1, a2)
    ]
    pattern = "|".join(map(re.escape, names))
    config = KronAConfig(a1=a1, a2=a2, alpha=SCALE, target_modules=pattern, **fields)
    generator = torch.Generator().manual_seed(len(names))
    tensors = {}
    for name in names:
        for key, shape in layer_shapes(config, name, module.get_submodule(name)).tensors.items():
            tensors[f"{name}.krona_{key}"] = torch.randn(shape, generator=generator)
    return SavedAdapter(config, tensors)


def updates(saved: SavedAdapter, module: nn.Module) -> dict[str, Tensor]:
    """Layer → ΔW = s · A ⊗ B in its weight's shape, from the definition."""
    return {name: _update(saved, name, module.get_submodule(name).weight.shape) for name in layers_of(saved)}


def layers_of(saved: SavedAdapter) -> list[str]:
    """Names of the layers that an adapter changes."""
    return [key.removesuffix(".krona_A") for key in saved.tensors if key.endswith(".krona_A")]


def _update(saved: SavedAdapter, name: str, shape: torch.Size) -> Tensor:
    factors = {key: saved.tensors.get(f"{name}.krona_{key}") for key in ("A", "B", "B1", "B2")}
    b = factors["B"] if factors["B"] is not None else factors["B1"] @ factors["B2"]
    return saved.config.alpha * torch.kron(factors["A"], b).view(shape)


def _divisible(layer: nn.Linear | nn.Conv2d, a1: int, a2: int) -> bool:
    d, h = layer.weight.shape[:2]
    return d % a1 == 0 and h % a2 == 0 and d > a1 and h > a2 and getattr(layer, "groups", 1) == 1
