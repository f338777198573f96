"""LoRA files, as kohya's scripts, LyCORIS, PEFT, Diffusers and ComfyUI read and write them: ΔW = s · up · down.

Tensors    up (d × r) and down (r × h, or r × h × kernel for a convolution, whose up is d × r × 1 × 1), named
           `<layer>.lora_up.weight` and `<layer>.lora_down.weight` by kohya and LyCORIS, `<layer>.lora_B.weight` and
           `<layer>.lora_A.weight` by PEFT and Diffusers, and by older Diffusers as in `PROCESSOR_PARTS`.
           Some programs leave out `.weight`, XLabs' writes `<layer>.up.weight` and `<layer>.down.weight`.
           PEFT's `lora_bias` adds `<layer>.lora_B.bias`, which is scaled like the rest.
           With LyCORIS' Tucker core `<layer>.lora_mid.weight` (r × r × kernel), down is r × h × 1 × 1.
Scale      alpha / r with the layer's own `<layer>.alpha`; or as PEFT's config in the header says; or else 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kron.products import dense_update
from ...kron.shapes import terms_of
from . import peft_configs, peft_modules
from .updates import KroneckerUpdate, LayerTensors, Update, flat, tucker

PARTS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.bias": "up_bias",
    ".lora_B.default.bias": "up_bias",
    ".lora_B": "up",
    ".lora_A": "down",
    ".lora_up": "up",
    ".lora_down": "down",
}
"""End of a tensor's name → part."""

PROCESSOR_PARTS = {
    f"{style}.{part}.weight": part
    for style in ("_lora", ".lora", ".lora_layer", ".lora_linear_layer", "")
    for part in ("up", "down")
}
"""The same for older Diffusers, whose attention processors held the adapters: `….processor.to_q_lora.up.weight`.

The paper's authors kept these names for factors of other shapes: see `reference`.
"""


@dataclass(frozen=True, eq=False)
class LoRA(Update):
    """ΔW = scale · up · down, or with a Tucker core scale · Σ mid[m, n, …] · up[i, m] · down[n, j].

    Attributes:
        up: d × r, or d × r × 1 × 1.
        down: r × h, or r × h × kernel.
        scale: s.
        mid: the Tucker core, r × r × kernel, or None.
    """

    up: Tensor
    down: Tensor
    scale: float
    mid: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """d × h, or d × h × kernel."""
        inputs = self.down.shape[1:] if self.mid is None else (self.down.shape[1], *self.mid.shape[2:])
        return torch.Size((self.up.shape[0], *inputs))

    def delta(self) -> Tensor:
        """ΔW, computed in fp32: d × h, or d × h × kernel."""
        up, down = flat(self.up.float()), self.down.float()
        if self.mid is not None:
            return self.scale * tucker(self.mid.float(), up.T, flat(down))
        return self.scale * (up @ flat(down)).reshape(up.shape[0], *down.shape[1:])


def read(layer: LayerTensors) -> Update:
    """One layer of a LoRA file; PEFT's own, if it was trained from PiSSA or OLoRA, which changed the base.

    Raises:
        AdapterFileError: a factor is missing, not finite, or they do not fit each other; or PEFT's config says
            something that the factors do not tell.
    """
    dims = (2, 3, 4, 5)
    up, down = layer.matrix("up", dims), layer.matrix("down", dims)
    mid = layer.matrix("mid", dims[1:]) if "mid" in layer.parts else None
    layer.check(flat(up).shape[1] == up.shape[1] == (down if mid is None else mid).shape[0], "up", "down", "mid")
    if mid is not None:
        layer.check(mid.shape[1] == down.shape[0] and flat(down).shape[1] == down.shape[1], "mid", "down")
    config = layer.peft_config
    if config is not None:
        peft_configs.check(layer, config, "LORA")
    scale, common = layer.scale(down.shape[0]), layer.common()
    if config is not None and peft_configs.is_rebased(config):
        return peft_modules.rebased_lora(layer, up, down)
    if "up_bias" in layer.parts:
        common["bias"] = scale * layer.parts["up_bias"].float().flatten()
    return LoRA(layer.parts["up"], layer.parts["down"], scale, layer.parts.get("mid"), kind="lora", **common)


def exact(update: KroneckerUpdate, kernel: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """up (d × r) and down (r × h, or r × h × kernel) of the same ΔW, r the sum of rank(A)·rank(B) over its terms.

    A ⊗ B with A = U·V and B = X·Y is (U ⊗ X)·(V ⊗ Y).

    Args:
        update: s · Σ A ⊗ B.
        kernel: of a convolution, which B's columns carry.
    """
    ups, downs = [], []
    scaled = update.scale * update.A
    for A, B in [(scaled, update.b_parts)] if update.b_parts is not None else terms_of(scaled, update.B):
        (U, V), (X, Y) = _factored(A), _factored(B) if isinstance(B, Tensor) else B
        ups.append(dense_update([(U, X)], update.layout))
        taps = Y.reshape(len(Y), -1, *kernel)
        downs.append(torch.einsum("ij,kl...->ikjl...", V, taps).flatten(2, 3).flatten(0, 1))
    return torch.cat(ups, dim=1).contiguous(), torch.cat(downs).contiguous()


def exact_rank(update: KroneckerUpdate) -> int:
    """r of `exact`."""
    if update.b_parts is not None:
        return _rank(update.A) * len(update.b_parts[1])
    return sum(_rank(A) * _rank(B) for A, B in terms_of(update.A, update.B))


def _rank(M: Tensor) -> int:
    return max(1, int(torch.linalg.matrix_rank(M.float())))


def _factored(M: Tensor) -> tuple[Tensor, Tensor]:
    """M = U·V, as thin as M's rank allows; without rounding where that is full."""
    rank = _rank(M)
    if rank == min(M.shape):
        unit = torch.eye(rank, dtype=M.dtype)
        return (M, unit) if M.shape[0] >= M.shape[1] else (unit, M)
    left, values, right = torch.linalg.svd(M.double(), full_matrices=False)
    roots = values[:rank].sqrt()
    return (left[:, :rank] * roots).to(M.dtype), (roots.unsqueeze(1) * right[:rank]).to(M.dtype)


def tensors(layers: Mapping[str, tuple[Tensor, Tensor]], kohya: bool) -> dict[str, Tensor]:
    """The tensors of a LoRA file: layer → up and down of ΔW = up · down.

    Args:
        layers: by the names of the program that it is for.
        kohya: `lora_up`, `lora_down` and an alpha; otherwise PEFT's `lora_B` and `lora_A`. The alpha is 1 and up is r
            times as large, since Diffusers (0.42.1) gives a layer the scale of another where alphas differ.
    """
    named: dict[str, Tensor] = {}
    for layer, (up, down) in layers.items():
        if kohya:
            wide = len(down) * up.reshape(*up.shape, *[1] * (down.dim() - 2))
            named[f"{layer}.lora_up.weight"], named[f"{layer}.lora_down.weight"] = wide, down
            named[f"{layer}.alpha"] = torch.tensor(1.0)
        else:
            named[f"{layer}.lora_A.weight"] = down
            named[f"{layer}.lora_B.weight"] = up.reshape(*up.shape, *[1] * (down.dim() - 2))
    return {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in named.items()}
