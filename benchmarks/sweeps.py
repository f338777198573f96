"""How a training step's cost grows with the factors, the tokens and the width: `python -m benchmarks.sweeps`.

Forward and backward of one layer, fp32 on this machine's CPU, as in `benchmarks.speed`: methods take turns in random
order, a ratio is the median over the rounds of one method's time over the frozen layer's in the same round. The
factors are those of the paper's Table 6. Writes `benchmarks/results/sweeps.md` and `.png`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measuring import Shape, median_ratio, steps, timed_in_turns
from .methods import METHODS, Method, krona

RESULTS = Path(__file__).parent / "results"
A1S = (1, 2, 4, 8, 16, 32, 64, 128)
A2S = (2, 4, 8, 16, 32, 64, 128)
TOKENS = (16, 64, 256, 1024, 4096)
WIDTHS = (320, 640, 1280, 2048, 3072)
FLOOR, DENSE = "frozen base", "dense ΔW (4, 64)"
BESIDE = ("KronA (4, 64)", "PEFT LoRA r=4", "PEFT LoKr factor 8", "LyCORIS factor 8 bypass")


def ratios(methods: Mapping[str, Method], shape: Shape, rounds: int) -> dict[str, float]:
    """Each method's step over the frozen layer's."""
    seconds = timed_in_turns(steps(methods, shape), rounds)
    return {name: median_ratio(times, seconds[FLOOR]) for name, times in seconds.items()}


def over_factors(rounds: int) -> tuple[np.ndarray, dict[str, float]]:
    """Every (a1, a2) at 1280 × 1280 and 1024 tokens, a1 down and a2 across; and the peers."""
    peers = {name: METHODS[name] for name in (FLOOR, DENSE, "PEFT LoRA r=4")}
    ours = {f"{a1} {a2}": krona(a1, a2) for a1 in A1S for a2 in A2S}
    found = ratios(peers | ours, Shape("", 1024, 1280, 1280, 1), rounds)
    grid = np.array([[found[f"{a1} {a2}"] for a2 in A2S] for a1 in A1S])
    return grid, {name: found[name] for name in peers}


def over(shapes: Sequence[Shape], rounds: int) -> dict[str, list[float]]:
    """The peers on each shape."""
    methods = {name: METHODS[name] for name in (FLOOR, *BESIDE)}
    found = [ratios(methods, shape, rounds) for shape in shapes]
    return {name: [f[name] for f in found] for name in BESIDE}


def table(head: Sequence[object], rows: Mapping[object, Sequence[float]]) -> list[str]:
    """In Markdown."""
    lines = ["| " + " | ".join(map(str, head)) + " |", "|---" * len(head) + "|"]
    return lines + [f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |" for name, row in rows.items()]


def draw_grid(axis: Axes, grid: np.ndarray) -> None:
    """The factors' costs as a heat map with its numbers."""
    axis.imshow(np.log(grid), cmap="viridis_r")
    axis.set_xticks(range(len(A2S)), [str(a2) for a2 in A2S])
    axis.set_yticks(range(len(A1S)), [str(a1) for a1 in A1S])
    axis.set_xlabel("a2")
    axis.set_ylabel("a1")
    axis.set_title("KronA step / frozen layer's\n1024 tokens, 1280 × 1280", fontsize=9)
    for (row, column), value in np.ndenumerate(grid):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white")


def draw_lines(axis: Axes, places: Sequence[int], rows: Mapping[str, Sequence[float]], what: str) -> None:
    """One line per method."""
    for name, values in rows.items():
        axis.plot(places, values, marker="o", markersize=3, label=name)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [str(place) for place in places])
    axis.set_ylim(bottom=0.9)
    axis.set_title(what, fontsize=9)
    axis.legend(fontsize=7)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    grid, peers = over_factors(rounds)
    by_tokens = over([Shape("", tokens, 1280, 1280, 1) for tokens in TOKENS], rounds)
    by_width = over([Shape("", 1024, width, width, 1) for width in WIDTHS], rounds)
    worst = grid.max() / peers[DENSE]
    lines = [__doc__ or "", f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds."]
    lines += ["", "## KronA (a1, a2), 1024 tokens, 1280 × 1280", ""]
    lines += table(["a1 \\ a2", *A2S], dict(zip(A1S, grid, strict=True)))
    lines += ["", f"LoRA r=4: {peers['PEFT LoRA r=4']:.2f}. Dense ΔW: {peers[DENSE]:.2f}."]
    lines += [f"The worst (a1, a2) over dense ΔW: {worst:.2f}."]
    lines += ["", "## Tokens, 1280 × 1280", "", *table(["step / frozen", *TOKENS], by_tokens)]
    lines += ["", "## Width, 1024 tokens", "", *table(["step / frozen", *WIDTHS], by_width)]
    print("\n".join(lines))
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    draw_grid(first, grid)
    draw_lines(second, TOKENS, by_tokens, "step / frozen layer's over tokens, 1280 × 1280")
    draw_lines(third, WIDTHS, by_width, "step / frozen layer's over width, 1024 tokens")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sweeps.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure.savefig(RESULTS / "sweeps.png", dpi=110)


if __name__ == "__main__":
    main()
