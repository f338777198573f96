"""The frozen layer, ours and the peers: each wraps one `nn.Linear` and trains its own parameters on top of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lycoris.modules.lokr import LokrModule
from peft import LoKrConfig, LoraConfig
from peft.tuners.lokr.layer import Linear as LoKrLinear
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

from diffusekrona import KronALayer
from diffusekrona.kron.products import kron_linear_b_first
from diffusekrona.kron.shapes import lokr_shapes

Method = Callable[[nn.Linear], nn.Module]


def frozen(base: nn.Linear) -> nn.Module:
    """No adapter: the floor."""
    return base


def krona(a1: int, a2: int) -> Method:
    """Ours."""

    def wrap(base: nn.Linear) -> nn.Module:
        layer = KronALayer(base)
        layer.update_layer("default", a1, a2, init_b="normal")
        return layer

    return wrap


def peft_lora(rank: int) -> Method:
    """PEFT's LoRA."""

    def wrap(base: nn.Linear) -> nn.Module:
        config = LoraConfig(r=rank, lora_alpha=rank)
        return LoraLinear(base, "default", config=config, r=rank, lora_alpha=rank)

    return wrap


def peft_lokr(rank: int, factor: int) -> Method:
    """PEFT's LoKr. A rank that is large enough keeps the second factor whole."""

    def wrap(base: nn.Linear) -> nn.Module:
        config = LoKrConfig(r=rank, alpha=rank, decompose_factor=factor)
        return LoKrLinear(base, "default", config, r=rank, alpha=rank)

    return wrap


def lycoris(shape: tuple[int, int] | None, *, bypass: bool) -> Method:
    """LyCORIS' LoKr with two whole factors: of its own factor 8, or with a first factor of any a1 × a2.

    It cannot choose the latter itself, but computes with such factors once they are put in.
    """

    def wrap(base: nn.Linear) -> nn.Module:
        module = LokrModule("lokr", base, lora_dim=8, alpha=8, factor=8, full_matrix=True, bypass_mode=bypass)
        if shape is not None:
            a1, a2 = shape
            module.lokr_w1 = nn.Parameter(torch.empty(a1, a2))
            module.lokr_w2 = nn.Parameter(torch.empty(base.out_features // a1, base.in_features // a2))
        for factor in module.parameters():
            nn.init.normal_(factor, std=0.02)
        return module

    return wrap


class _FromFactors(nn.Module):
    """A base layer and two factors, combined by `delta(x, A, B)`."""

    def __init__(self, base: nn.Linear, a1: int, a2: int, delta: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.base, self.delta = base, delta
        self.A = nn.Parameter(torch.randn(a1, a2) / a2)
        self.B = nn.Parameter(torch.randn(base.out_features // a1, base.in_features // a2) / a2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x, self.A, self.B)


def dense(a1: int, a2: int) -> Method:
    """ΔW built in every step."""
    return lambda base: _FromFactors(base, a1, a2, lambda x, A, B: functional.linear(x, torch.kron(A, B)))


def b_first(a1: int, a2: int) -> Method:
    """The products in the other order, in plain PyTorch."""
    return lambda base: _FromFactors(base, a1, a2, kron_linear_b_first)


Factors = tuple[int, int] | int
"""(a1, a2), or LoKr's factor, from which each layer has its own."""


def of_layer(base: nn.Linear, factors: Factors) -> tuple[int, int]:
    """(a1, a2) for one layer."""
    return lokr_shapes(base.out_features, base.in_features, factors)[:2] if isinstance(factors, int) else factors


def krona_of(factors: Factors) -> Method:
    """Ours."""
    return lambda base: krona(*of_layer(base, factors))(base)


def one_einsum(factors: Factors) -> Method:
    """OneTrainer's order of operations: one einsum of three operands, a multiplication and a sum."""

    def delta(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        X = x.unflatten(-1, (A.shape[1], B.shape[1]))
        return torch.einsum("...jl,ij,kl->...ik", X, A, B).flatten(-2) * SCALE

    return lambda base: _FromFactors(base, *of_layer(base, factors), delta)


def always_b_first(factors: Factors) -> Method:
    """ai-toolkit's order of operations: B, then A, a multiplication and a sum."""
    return lambda base: _FromFactors(
        base, *of_layer(base, factors), lambda x, A, B: kron_linear_b_first(x, A, B) * SCALE
    )


SCALE = 0.5
"""Theirs are alpha / rank, multiplied whatever it is."""

FACTORS: dict[str, Factors] = {"(4, 64)": (4, 64), "(8, 8)": (8, 8), "factor -1": -1}
WAYS: dict[str, Callable[[Factors], Method]] = {
    "KronA": krona_of,
    "OneTrainer's order": one_einsum,
    "ai-toolkit's order": always_b_first,
}
TODAY: dict[str, Method] = {
    "frozen base": frozen,
    "PEFT LoRA r=4": peft_lora(4),
    **{f"{way}, {name}": made(factors) for name, factors in FACTORS.items() for way, made in WAYS.items()},
}
"""The steps of today's programs that build no ΔW, each at the same factors."""

METHODS: dict[str, Method] = {
    "frozen base": frozen,
    "KronA (4, 64)": krona(4, 64),
    "KronA (8, 8)": krona(8, 8),
    "PEFT LoRA r=4": peft_lora(4),
    "PEFT LoRA r=32": peft_lora(32),
    "PEFT LoKr factor 8": peft_lokr(100_000, 8),
    "PEFT LoKr factor -1, r=8": peft_lokr(8, -1),
    "LyCORIS (4, 64) rebuild": lycoris((4, 64), bypass=False),
    "LyCORIS (4, 64) bypass": lycoris((4, 64), bypass=True),
    "LyCORIS factor 8 rebuild": lycoris(None, bypass=False),
    "LyCORIS factor 8 bypass": lycoris(None, bypass=True),
    "dense ΔW (4, 64)": dense(4, 64),
    "B first (4, 64)": b_first(4, 64),
}
