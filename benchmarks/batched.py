"""What eight adapters in one batch of eight cost: `python -m benchmarks.batched`.

Every attention projection of SDXL at 1024², forward only, as when images are drawn, on this machine's CPU, in fp32 and
bf16. Over the frozen layer's time: one adapter for the whole batch; eight in one batch, ours by `krona_batch` and that
of LoRA by PEFT's mixed batch; and what is done today for eight requests, one after the other: switching between
adapters, putting each one's numbers into the place of one (hot swap, without reading a file), or merging each before
its picture and unmerging it afterwards. All take turns in every round, in random order; a ratio is the median over the
rounds of one's time over the other's in the same round. The targets: eight of ours cost at most 1.05 times one of ours,
and at most what eight LoRA cost. Writes `benchmarks/results/batched.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from diffusekrona import KronAConfig, inject_krona, krona_batch

from .measuring import Shape, median_ratio, timed_in_turns
from .speed import SDXL

RESULTS = Path(__file__).parent / "results"
NAMES = [f"subject {number}" for number in range(8)]
FACTORS = ((4, 64), (8, 8))
FLOOR = "frozen base"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Action = Callable[[], None]
Measured = dict[str, dict[str, float]]


def ours(base: nn.Linear, a1: int, a2: int, x: Tensor) -> dict[str, Action]:
    """One of our adapters for all samples, eight at once, and eight one after the other."""
    model = nn.Sequential(base)
    for name in NAMES:
        inject_krona(model, KronAConfig(a1=a1, a2=a2, target_modules=["0"], init_weights=False), name)
    layer: Any = model[0]
    for name in NAMES:
        layer.cast_factors(name, to_base=True)
    layer.set_adapter(NAMES[:1], inference_mode=True)
    label = f"KronA ({a1}, {a2})"

    def together() -> None:
        with krona_batch(model, NAMES):
            layer(x)

    return {f"{label}, one": lambda: layer(x), f"{label}, eight": together} | _in_turn(layer, label, x)


def theirs(base: nn.Linear, x: Tensor) -> dict[str, Action]:
    """The same with PEFT's LoRA of rank 4."""
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False)
    layer = LoraLinear(base, NAMES[0], config=config, r=4, lora_alpha=4)
    for name in NAMES[1:]:
        layer.update_layer(name, r=4, lora_alpha=4, config=config)
    layer.to(x.dtype).requires_grad_(False)
    layer.set_adapter(NAMES[:1], inference_mode=True)
    label = "PEFT LoRA r=4"
    found = {f"{label}, one": lambda: layer(x), f"{label}, eight": lambda: layer(x, adapter_names=NAMES)}
    return found | _in_turn(layer, label, x)


def _in_turn(layer: Any, label: str, x: Tensor) -> dict[str, Action]:
    def switched() -> None:
        for row, name in enumerate(NAMES):
            layer.set_adapter([name], inference_mode=True)
            layer(x[row : row + 1])
        layer.set_adapter(NAMES[:1], inference_mode=True)

    slot = _parameters(layer, NAMES[0])
    saved = [[parameter.detach().clone() for parameter in _parameters(layer, name)] for name in NAMES]

    def swapped() -> None:
        for row, tensors in enumerate(saved):
            for parameter, tensor in zip(slot, tensors, strict=True):
                parameter.data.copy_(tensor)
            layer(x[row : row + 1])

    def merged() -> None:
        for row, name in enumerate(NAMES):
            layer.merge(adapter_names=[name])
            layer(x[row : row + 1])
            layer.unmerge()

    return {f"{label}, switched": switched, f"{label}, hot swap": swapped, f"{label}, merged": merged}


def _parameters(layer: Any, name: str) -> list[nn.Parameter]:
    """An adapter's own."""
    return [parameter for key, parameter in layer.named_parameters() if f".{name}" in key]


@torch.no_grad()
def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> Measured:
    """Each action's median seconds, and its ratio to each other's."""
    torch.manual_seed(0)
    x = torch.randn(len(NAMES), shape.tokens, shape.h, dtype=dtype)

    def base() -> nn.Linear:
        layer = nn.Linear(shape.h, shape.d, bias=False, dtype=dtype).requires_grad_(False)
        nn.init.normal_(layer.weight, std=shape.h**-0.5, generator=torch.Generator().manual_seed(1))
        return layer

    frozen = base()
    actions: dict[str, Action] = {FLOOR: lambda: frozen(x)}
    for a1, a2 in FACTORS:
        actions |= ours(base(), a1, a2, x)
    actions |= theirs(base(), x)
    seconds = timed_in_turns(actions, rounds)
    return {
        name: {"seconds": statistics.median(times)} | {other: median_ratio(times, seconds[other]) for other in actions}
        for name, times in seconds.items()
    }


def table(found: list[tuple[Shape, Measured]]) -> list[str]:
    """Each shape, and all of SDXL's layers together: ratios weighted by the time that they are of."""
    lines = [
        "| | " + " | ".join(shape.name for shape, _ in found) + " | all layers |",
        "|---" * (len(found) + 2) + "|",
        "| *tokens × h → d, layers* | "
        + " | ".join(f"{shape.tokens} × {shape.h} → {shape.d}, {shape.layers}" for shape, _ in found)
        + f" | {sum(shape.layers for shape, _ in found)} |",
    ]

    def row(label: str, name: str, over: str) -> str:
        ratios = [one[name][over] for _, one in found]
        weights = [shape.layers * one[over]["seconds"] for shape, one in found]
        mean = sum(w * ratio for w, ratio in zip(weights, ratios, strict=True)) / sum(weights)
        return f"| {label} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + f" | {mean:.2f} |"

    names = list(found[0][1])
    lines += [row(f"{name} / frozen", name, FLOOR) for name in names[1:]]
    for a1, a2 in FACTORS:
        label = f"KronA ({a1}, {a2})"
        lines.append(row(f"**{label}, eight / one**", f"{label}, eight", f"{label}, one"))
        lines.append(row(f"**{label}, eight / LoRA's eight**", f"{label}, eight", "PEFT LoRA r=4, eight"))
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    measured: dict[str, Any] = {}
    lines = [__doc__ or ""]
    for label, dtype in DTYPES.items():
        found = [(shape, measure(shape, dtype, arguments.rounds)) for shape in SDXL]
        measured[label] = [{"shape": shape.__dict__, "ratios": ratios} for shape, ratios in found]
        lines += ["", f"## {label}", "", *table(found)]
    lines += ["", f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
              f"{arguments.rounds} rounds."]  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "batched.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))
    (RESULTS / "batched.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
