"""How well `diffusekrona.kron.shapes` predicts what a training step costs, from counting alone.

A step's predicted time is its multiply-adds plus `balance` times the elements that it moves. The one number that
depends on the machine, `balance`, is fitted to all measured ratios at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from diffusekrona.kron.costs import StepCost, frozen_step, krona_step, lokr_step, lora_step, merging_pays
from diffusekrona.kron.shapes import factor_shapes

from .measuring import Shape


def krona(shape: Shape, a1: int, a2: int) -> StepCost:
    """Ours, as a CPU does it in fp32."""
    shapes = factor_shapes(shape.d, shape.h, a1, a2)
    return krona_step(shapes, shape.tokens, merged=merging_pays(shapes, shape.tokens))


COUNTS: Mapping[str, Callable[[Shape], StepCost]] = {
    "KronA (4, 64)": lambda s: krona(s, 4, 64),
    "KronA (8, 8)": lambda s: krona(s, 8, 8),
    "PEFT LoRA r=4": lambda s: lora_step(s.d, s.h, 4, s.tokens),
    "PEFT LoRA r=32": lambda s: lora_step(s.d, s.h, 32, s.tokens),
    "PEFT LoKr factor 8": lambda s: lokr_step(s.d, s.h, None, 8, s.tokens),
    "PEFT LoKr factor -1, r=8": lambda s: lokr_step(s.d, s.h, 8, -1, s.tokens),
}
Measured = Mapping[str, float]  # method → its step over the frozen layer's


def predicted(shape: Shape, method: str, balance: float) -> float:
    """The method's step over the frozen layer's."""
    floor = frozen_step(shape.d, shape.h, shape.tokens)
    return COUNTS[method](shape).time(balance) / floor.time(balance)


def counts_table(shapes: Iterable[Shape]) -> list[str]:
    """Multiply-adds and moved bytes (fp32) of one layer's step, in Markdown."""
    methods = {"frozen base": lambda s: frozen_step(s.d, s.h, s.tokens), **COUNTS}
    lines = ["| million multiply-adds, MB moved | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for shape in shapes:
        costs = [count(shape) for count in methods.values()]
        cells = [f"{cost.multiply_adds / 1e6:,.0f}, {4 * cost.elements / 1e6:,.0f}" for cost in costs]
        lines.append(f"| {shape.name} | " + " | ".join(cells) + " |")
    return lines


def errors(found: Mapping[Shape, Measured], balance: float) -> np.ndarray:
    """log(predicted / measured), shapes down and methods across."""
    rows = [[np.log(predicted(shape, m, balance) / measured[m]) for m in COUNTS] for shape, measured in found.items()]
    return np.array(rows)


def fitted_balance(found: Mapping[Shape, Measured]) -> float:
    """The balance with the smallest squared error."""
    return float(min(np.geomspace(1, 1000, 301), key=lambda balance: np.square(errors(found, balance)).sum()))


def table(found: Mapping[Shape, Measured], balance: float) -> list[str]:
    """Predicted beside measured, in Markdown."""
    typical = float(np.exp(np.median(np.abs(errors(found, balance)))) - 1)
    lines = [
        f"Fitted balance: {balance:.0f} multiply-adds in the time of moving one element. The prediction is off by "
        f"{typical:.0%} in the median.",
        "",
        "| predicted (measured) | " + " | ".join(COUNTS) + " |",
        "|---" * (len(COUNTS) + 1) + "|",
    ]
    for shape, measured in found.items():
        cells = [f"{predicted(shape, method, balance):.2f} ({measured[method]:.2f})" for method in COUNTS]
        lines.append(f"| {shape.name} | " + " | ".join(cells) + " |")
    return lines


def draw(found: Mapping[Shape, Measured], balance: float, path: Path) -> None:
    """One dot per method and shape."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    for method in COUNTS:
        ratios = [measured[method] for measured in found.values()]
        axis.plot([predicted(shape, method, balance) for shape in found], ratios, "o", markersize=4, label=method)
    ends = (1.0, max(max(measured[method] for method in COUNTS) for measured in found.values()))
    axis.plot(ends, ends, color="black", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="predicted step / frozen layer's", ylabel="measured")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(FixedLocator([1, 1.5, 2, 3, 4]))
        side.set_major_formatter(StrMethodFormatter("{x:g}"))
        side.set_minor_locator(NullLocator())
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
