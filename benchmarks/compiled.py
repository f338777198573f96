"""A training step with and without `torch.compile`: `python -m benchmarks.compiled`.

Forward and backward of one layer, fp32 on this machine's CPU, each method as it is and compiled by inductor, as one
graph; all take turns in every round, in random order. A ratio is the median over the rounds of a time over that of
the frozen layer, not compiled, in the same round. Between the rounds factors and weight change their values, which
must not cause another compilation. Needs a C++ compiler. Writes `benchmarks/results/compiled.md`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from .measuring import Shape, Step, median_ratio, steps, timed_in_turns
from .methods import METHODS
from .speed import SDXL

RESULT = Path(__file__).parent / "results" / "compiled.md"
CHOSEN = ("frozen base", "KronA (4, 64)", "KronA (8, 8)", "PEFT LoRA r=4")


def compiled(step: Step) -> float:
    """Compile its layer; seconds for that, the first forward and backward included."""
    step.layer = torch.compile(step.layer, fullgraph=True, dynamic=False)
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def gradients(step: Step) -> list[torch.Tensor]:
    """Gradients of the input and of the parameters after a step."""
    step()
    return [tensor.grad for tensor in (step.x, *step.layer.parameters()) if tensor.grad is not None]


def change_values(step: Step) -> None:
    """Change all parameters in place, as an optimizer or the loading of another base does."""
    with torch.no_grad():
        for parameter in step.layer.parameters():
            parameter.mul_(1.01)


def measure(shape: Shape, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios to the frozen layer, and seconds of compiling."""
    methods = {name: METHODS[name] for name in CHOSEN}
    plain, twins = steps(methods, shape), steps(methods, shape)
    for name, step in plain.items():
        for ours, theirs in zip(step.layer.parameters(), twins[name].layer.parameters(), strict=True):
            theirs.data = ours.data
    seconds = {name: compiled(step) for name, step in twins.items()}
    for name, step in plain.items():
        for eager, fused in zip(gradients(step), gradients(twins[name]), strict=True):
            torch.testing.assert_close(fused, eager, rtol=1e-3, atol=1e-3 * float(eager.abs().max()))
    for step in twins.values():
        change_values(step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        times = timed_in_turns(plain | {f"{name}, compiled": step for name, step in twins.items()}, rounds)
    return {name: median_ratio(found, times[CHOSEN[0]]) for name, found in times.items()}, seconds


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    found = {}
    for shape in SDXL:
        torch.compiler.reset()
        found[shape.name] = measure(shape, rounds)
    lines = [__doc__ or "", f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds.", ""]
    lines += ["| step / frozen layer's | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for name in CHOSEN:
        for twin in (name, f"{name}, compiled"):
            lines.append(f"| {twin} | " + " | ".join(f"{ratios[twin]:.2f}" for ratios, _ in found.values()) + " |")
    compiling = [f"{name} {sum(seconds[name] for _, seconds in found.values()) / len(found):.1f}" for name in CHOSEN]
    lines += [
        "",
        f"Seconds to compile, mean: {', '.join(compiling)}. Graph breaks: {sum(counters['graph_break'].values())}.",
    ]
    print("\n".join(lines))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
