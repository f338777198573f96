"""What a training step costs in multiply-adds and memory, with the products in either order, and with PEFT's methods.

Notation as in `shapes`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .shapes import FactorShapes, lokr_keeps_w2, lokr_shapes, lora_parameters

Order = Literal["A first", "B first"]


BALANCE = 25.0
"""Multiply-adds that a CPU does while it moves one tensor element; `benchmarks/speed.py` fits it to measurements."""


LARGEST_MERGED = 1 << 22
"""Entries of the largest W + A ⊗ B that a training step builds: 16 MiB in fp32, what a CPU's caches hold."""


def krona_multiply_adds(shapes: FactorShapes, order: Order, tokens: int = 1) -> int:
    """Multiply-adds of (A ⊗ B)x for `tokens` inputs, without ever building A ⊗ B.

    A first makes an a1 × b2 intermediate per token: a1·a2·b2 + a1·b2·b1. B first makes an a2 × b1 one:
    a2·b2·b1 + a1·a2·b1.
    """
    first, second, _ = _products(shapes, order)
    return tokens * (first + second)


def _products(shapes: FactorShapes, order: Order) -> tuple[int, int, int]:
    """Of (A ⊗ B)x for one token: multiply-adds of its first and second product, and the size of what is between."""
    a1, a2, b1, b2 = shapes
    if order == "A first":
        return a1 * a2 * b2, a1 * b1 * b2, a1 * b2
    return a2 * b1 * b2, a1 * a2 * b1, a2 * b1


def cheapest_order(shapes: FactorShapes) -> Order:
    """The order of the two products of (A ⊗ B)x that needs fewer multiply-adds; A first on a tie."""
    a_first = krona_multiply_adds(shapes, "A first")
    return "A first" if a_first <= krona_multiply_adds(shapes, "B first") else "B first"


def cheapest_conv_order(shapes: FactorShapes, kernel: int) -> Order:
    """`cheapest_order` for a convolution of `kernel` taps that B carries, where it keeps the image's size."""
    a1, a2, b1, b2 = shapes
    a_first, b_first = a1 * b2 * (a2 + b1 * kernel), a2 * b1 * (b2 * kernel + a1)
    return "A first" if a_first <= b_first else "B first"


class StepCost(NamedTuple):
    """What one training step of one layer takes: forward, and backward to its input and to what is trained.

    Attributes:
        multiply_adds: in products of matrices.
        elements: tensor elements read or written, counted once for every operation that touches them.
    """

    multiply_adds: int
    elements: int

    def time(self, balance: float) -> float:
        """The step's time in multiply-adds, on a machine that does `balance` of them while it moves one element."""
        return self.multiply_adds + balance * self.elements


def frozen_step(d: int, h: int, tokens: int) -> StepCost:
    """The step of a layer without an adapter: output and input gradient. It is part of all that follow."""
    return StepCost(2 * tokens * d * h, 2 * tokens * (d + h) + 2 * d * h)


def krona_step(shapes: FactorShapes, tokens: int, order: Order | None = None, merged: bool = False) -> StepCost:
    """The step of a layer with KronA as `fused.linear_with_kron` does it, in the cheaper order unless told otherwise.

    The order's intermediate is made twice, since it is not kept for the backward pass. With `merged`, the output and
    the input's gradient come from W + A ⊗ B, which is built for either of them, and only the factors' gradients from
    products with the factors. Copies of a factor are not counted.
    """
    order = order or cheapest_order(shapes)
    a1, a2, b1, b2 = shapes
    first, second, made = _products(shapes, order)
    for_gradient_of_a = 2 * min(a1 * a2, (a1 + a2) * (b2 if order == "A first" else b1))
    floor = frozen_step(shapes.d, shapes.h, tokens)
    gradients = StepCost(
        2 * tokens * (first + second),
        tokens * (2 * shapes.h + 2 * shapes.d + 4 * made + for_gradient_of_a) + 2 * (a1 * a2 + b1 * b2),
    )
    output = _merged_output(shapes) if merged else _added_output(shapes, tokens, order)
    return StepCost(*map(sum, zip(floor, gradients, output, strict=True)))


def merging_pays(shapes: FactorShapes, tokens: int) -> bool:
    """Whether a step on a CPU is cheaper with W + A ⊗ B built in full precision than with products added to W's.

    That is where the tokens are many for the layer's size. Memory that is written for the first time counts twice,
    and the sum must fit into a cache.
    """
    size = shapes.d * shapes.h
    added, merged = _added_output(shapes, tokens, cheapest_order(shapes)), _merged_output(shapes)
    return size <= LARGEST_MERGED and added.time(BALANCE) > merged.time(BALANCE) + BALANCE * 2 * size


def _added_output(shapes: FactorShapes, tokens: int, order: Order) -> StepCost:
    """What adding the update's parts to the output and to the input's gradient takes."""
    first, second, made = _products(shapes, order)
    a, b = shapes.a1 * shapes.a2, shapes.b1 * shapes.b2
    return StepCost(
        tokens * (2 * first + second),
        tokens * (3 * shapes.h + 2 * shapes.d + 3 * made) + (2 * a + b if order == "A first" else a + 2 * b),
    )


def _merged_output(shapes: FactorShapes) -> StepCost:
    """What building W + A ⊗ B takes, once for the output and once for the input's gradient."""
    return StepCost(0, 2 * (2 * shapes.d * shapes.h + shapes.a1 * shapes.a2 + shapes.b1 * shapes.b2))


def lora_step(d: int, h: int, r: int, tokens: int) -> StepCost:
    """The step of a layer with LoRA as PEFT does it: two products, a scaling, and two sums as large as the layer's."""
    floor = frozen_step(d, h, tokens)
    return StepCost(
        floor.multiply_adds + 3 * tokens * lora_parameters(d, h, r),
        floor.elements + tokens * (6 * h + 10 * d + 6 * r) + 3 * r * (d + h),
    )


def lokr_step(d: int, h: int, r: int | None, factor: int, tokens: int) -> StepCost:
    """The step of a layer with LoKr as PEFT does it: ΔW is built, scaled, applied and differentiated at full size."""
    w, floor = lokr_shapes(d, h, factor), frozen_step(d, h, tokens)
    whole, inner = w.b1 * w.b2, 0 if lokr_keeps_w2(w, r) else r or 0
    build_w2 = 3 * (whole + inner * (w.b1 + w.b2)) if inner else 0
    return StepCost(
        floor.multiply_adds + 3 * inner * whole + 3 * tokens * d * h,
        floor.elements + tokens * (6 * h + 6 * d) + 14 * d * h + 3 * (w.a1 * w.a2 + whole) + build_w2,
    )
