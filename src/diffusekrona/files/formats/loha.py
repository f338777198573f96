"""LoHa files, as LyCORIS, PEFT and ComfyUI read and write them: ΔW = s · (w1_a · w1_b) ∘ (w2_a · w2_b).

Tensors    `<layer>.hada_w1_a` and `<layer>.hada_w2_a` (d × r), `<layer>.hada_w1_b` and `<layer>.hada_w2_b` (r × h,
           or r × (h·kernel) for a convolution). With Tucker cores `<layer>.hada_t1` and `<layer>.hada_t2`
           (r × r × kernel), the former are r × d and the latter r × h.
Scale      alpha / r with the layer's own `<layer>.alpha`; or as PEFT's config in the header says; or else 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import peft_configs
from .updates import LayerTensors, Update, tucker

PARTS = {f".hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
"""End of a tensor's name → part."""


@dataclass(frozen=True, eq=False)
class LoHa(Update):
    """ΔW = scale · (w1_a · w1_b) ∘ (w2_a · w2_b), either product with its Tucker core if it has one.

    Attributes:
        w1_a: d × r, or r × d with a core; w2_a likewise.
        w1_b: r × h, or r × (h·kernel); w2_b likewise.
        scale: s.
        cores: the two Tucker cores, r × r × kernel, or None.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float
    cores: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        """d × h, d × (h·kernel), or with cores d × h × kernel."""
        if self.cores is None:
            return torch.Size((self.w1_a.shape[0], self.w1_b.shape[1]))
        return torch.Size((self.w1_a.shape[1], self.w1_b.shape[1], *self.cores[0].shape[2:]))

    def delta(self) -> Tensor:
        """ΔW, computed in fp32: d × h, d × (h·kernel), or with cores d × h × kernel."""
        one, two = (self.w1_a.float(), self.w1_b.float()), (self.w2_a.float(), self.w2_b.float())
        if self.cores is None:
            return self.scale * (one[0] @ one[1]) * (two[0] @ two[1])
        core1, core2 = self.cores
        return self.scale * tucker(core1.float(), *one) * tucker(core2.float(), *two)


def read(layer: LayerTensors) -> LoHa:
    """One layer of a LoHa file.

    Raises:
        AdapterFileError: a factor is missing, not finite, or they do not fit each other.
    """
    if layer.peft_config is not None:
        peft_configs.check(layer, layer.peft_config, "LOHA")
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    w1_a, w1_b, w2_a, w2_b = (layer.matrix(name) for name in names)
    cores = None
    if "t1" in layer.parts or "t2" in layer.parts:
        t1, t2 = layer.matrix("t1", (3, 4, 5)), layer.matrix("t2", (3, 4, 5))
        layer.check(t1.shape[:2] == (w1_a.shape[0], w1_b.shape[0]), "t1", "w1_a", "w1_b")
        layer.check(t2.shape[:2] == (w2_a.shape[0], w2_b.shape[0]), "t2", "w2_a", "w2_b")
        layer.check(t1.shape[2:] == t2.shape[2:] and w1_a.shape[1] == w2_a.shape[1], "t1", "t2", "w1_a", "w2_a")
        cores = (layer.parts["t1"], layer.parts["t2"])
    else:
        layer.check(w1_a.shape[1] == w1_b.shape[0] and w2_a.shape[1] == w2_b.shape[0], *names)
        layer.check(w1_a.shape[0] == w2_a.shape[0], *names)
    layer.check(w1_b.shape[1] == w2_b.shape[1], *names)
    return LoHa(
        layer.parts["w1_a"],
        layer.parts["w1_b"],
        layer.parts["w2_a"],
        layer.parts["w2_b"],
        layer.scale(w1_b.shape[0]),
        cores,
        kind="loha",
        **layer.common(),
    )
