"""LoKr files, as LyCORIS, PEFT and ComfyUI read and write them: ΔW = s · w1 ⊗ w2.

Tensors    `<layer>.lokr_w1` (a1 × a2) and `<layer>.lokr_w2` (b1 × b2, or b1 × b2 × kernel for a convolution), or
           either of them as a product of two: `lokr_w1_a` (a1 × r) and `lokr_w1_b` (r × a2), `lokr_w2_a` (b1 × r) and
           `lokr_w2_b` (r × b2, or r × (b2·kernel)). With a Tucker core `lokr_t2` (r × r × kernel), `lokr_w2_a` is
           r × b1 and `lokr_w2_b` r × b2.
Scale      alpha / r where a factor is a product, r being w2's if both are. Two whole factors have no rank: LyCORIS,
           ComfyUI and Diffusers then ignore `<layer>.alpha`. PEFT writes none, and always scales by its config.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import peft_configs
from .updates import LARGEST_PRODUCT, KroneckerUpdate, LayerTensors, flat, tucker

PARTS = {f".lokr_{part}": part for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
"""End of a tensor's name → part."""

LARGEST_W1 = 1 << 22
"""Numbers of w1, the smaller factor, where it is a product."""


def read(layer: LayerTensors) -> KroneckerUpdate:
    """One layer of a LoKr file; products are computed in fp32.

    Raises:
        AdapterFileError: a factor is missing, not finite, or its parts do not fit each other; or PEFT's config says
            something that the factors do not tell.
    """
    if layer.peft_config is not None:
        peft_configs.check(layer, layer.peft_config, "LOKR")
    w1, rank = _factor(layer, "w1", (2,))
    w2, w2_rank = _factor(layer, "w2", (2, 3, 4, 5))
    A = w1 if isinstance(w1, Tensor) else w1[0] @ w1[1]
    return KroneckerUpdate(A, w2, layer.scale(w2_rank or rank), kind="lokr", **layer.common())


def _factor(layer: LayerTensors, name: str, dims: tuple[int, ...]) -> tuple[Tensor | tuple[Tensor, Tensor], int | None]:
    """A factor, or the two matrices it is a product of, all flat; and the product's rank."""
    left, right, core = f"{name}_a", f"{name}_b", name.replace("w", "t")
    if name in layer.parts:
        layer.check({left, right, core}.isdisjoint(layer.parts), *sorted(layer.parts))
        return flat(layer.matrix(name, dims)), None
    if core in layer.parts:
        a, b, t = layer.matrix(left), layer.matrix(right), layer.matrix(core, (3, 4, 5))
        layer.check(t.shape[:2] == (a.shape[0], b.shape[0]), core, left, right)
        layer.check_product(a.shape[1], b.shape[1], *t.shape[2:])
        return flat(_finite(layer, name, tucker(t, a, b))), b.shape[0]
    a, b = layer.matrix(left), layer.matrix(right, dims)
    layer.check(a.shape[1] == b.shape[0], left, right)
    layer.check_product(a.shape[0], *b.shape[1:], most=LARGEST_W1 if name == "w1" else LARGEST_PRODUCT)
    largest = len(b) * float(a.abs().max()) * float(b.abs().max())
    if not largest <= torch.finfo(a.dtype).max:  # the product's numbers may be smaller
        _finite(layer, name, a @ flat(b))
    return (a, flat(b)), b.shape[0]


def _finite(layer: LayerTensors, name: str, product: Tensor) -> Tensor:
    if not bool(product.isfinite().all()):
        raise layer.error(f"gives an infinity or a NaN in {name}: its training failed, or the file is damaged")
    return product


def numbers_built(parts: Mapping[str, Tensor], update: KroneckerUpdate) -> int:
    """How many numbers `read` built that the file does not hold: A's, and a B's with a core."""
    a1, a2, b1, b2 = update.shapes
    return ("w1" not in parts) * a1 * a2 + ("t2" in parts) * b1 * b2


def tensors(
    layers: Mapping[str, tuple[Tensor, Tensor | tuple[Tensor, Tensor], float]], rank_of_whole: int = 1
) -> dict[str, Tensor]:
    """The tensors of a LoKr file: layer, in the naming of the programs it is for → A, B and s.

    w1 is s·A, and alpha is the rank, or for whole factors, which have none, the one that the header states: so
    programs that divide alpha by the rank and programs that ignore it find the same ΔW, and LyCORIS, which merges
    products with its scale squared, too.
    A B1·B2 whose rank is half of B's longer side or more is written as a whole, since LyCORIS and PEFT expect it so.
    All are fp32 and on the CPU.

    Args:
        layers: A, B and s of ΔW = s · A ⊗ B. A is a1 × a2; B is b1 × b2, or b1 × b2 × kernel for a convolution, or a
            product, B1 of b1 × r and B2 of r × b2, or r × b2 × kernel.
        rank_of_whole: what the header has as the rank of all layers.
    """
    named: dict[str, Tensor] = {}
    for layer, (A, B, scale) in layers.items():
        rank = rank_of_whole
        if isinstance(B, tuple):
            left, right = _stored(B[0]), _stored(B[1])
            if 2 * left.shape[1] < max(left.shape[0], right.shape[1]):
                rank = left.shape[1]
                named[f"{layer}.lokr_w2_a"], named[f"{layer}.lokr_w2_b"] = left, flat(right)
            else:
                named[f"{layer}.lokr_w2"] = (left @ flat(right)).reshape(len(left), *right.shape[1:])
        else:
            named[f"{layer}.lokr_w2"] = _stored(B)
        named[f"{layer}.lokr_w1"] = scale * _stored(A)
        named[f"{layer}.alpha"] = torch.tensor(float(rank))
    return named


def _stored(tensor: Tensor) -> Tensor:
    # A copy, since safetensors saves no two tensors that share memory.
    return tensor.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
