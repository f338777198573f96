"""What a training step of one adapted layer costs whose weight is quantized: `python -m benchmarks.quantized`.

Layers of Stable Diffusion 1.5 at 512², SDXL at 1024² and a FLUX-like transformer, in the formats of `--quantize`, on
this machine's CPU in bfloat16: forward and backward, the input asking for its gradient as it does inside a network.
KronA and PEFT's LoRA take turns over the same layer in every round, in random order; a ratio is the median over the
rounds of one method's time over the other's in the same round. The target is that KronA's step costs at most that of
LoRA r=32. Writes `benchmarks/results/quantized.md` and `.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from diffusekrona import KronAConfig, inject_krona
from diffusekrona.bases.quantization import PACKAGES

from .measuring import Shape, Step, median_ratio, timed_in_turns

RESULTS = Path(__file__).parent / "results"
SHAPES = (
    Shape("SD 1.5 640, self", tokens=1024, h=640, d=640, layers=30),
    Shape("SDXL 1280, self", tokens=1024, h=1280, d=1280, layers=360),
    Shape("SDXL 1280, text", tokens=77, h=2048, d=1280, layers=120),
    Shape("FLUX-like 3072", tokens=1024, h=3072, d=3072, layers=1),
)
FLOOR, OURS, THEIRS = "frozen base", "KronA (4, 64)", "PEFT LoRA r=32"


def quantized(layer: nn.Linear, kind: str) -> nn.Sequential:
    """A model of one layer in a format, as `load_base` quantizes it."""
    if kind == "nf4":
        import bitsandbytes

        settings = {"compute_dtype": torch.bfloat16, "quant_type": "nf4", "compress_statistics": True}
        found = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, **settings)
        found.load_state_dict(layer.state_dict())
        return nn.Sequential(found.to("cpu")).requires_grad_(False)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, quantize_

    model = nn.Sequential(layer)
    int8 = Int8WeightOnlyConfig(granularity=PerRow(), version=2)
    quantize_(model, int8 if kind == "int8" else Float8WeightOnlyConfig())
    return model.requires_grad_(False)


def steps(shape: Shape, kind: str) -> dict[str, Step]:
    """Of each method, over the same weight."""
    torch.manual_seed(0)
    layer = nn.Linear(shape.h, shape.d, bias=False).to(torch.bfloat16)
    x, gradient = (torch.randn(1, shape.tokens, side).to(torch.bfloat16) for side in (shape.h, shape.d))
    frozen, ours, theirs = (quantized(copy.deepcopy(layer), kind) for _ in range(3))
    inject_krona(ours, KronAConfig(a1=4, a2=64, target_modules=["0"], init_b="normal"))
    inject_adapter_in_model(LoraConfig(r=32, lora_alpha=32, target_modules=["0"], init_lora_weights=False), theirs)
    return {name: Step(m, x, gradient, half=True) for name, m in {FLOOR: frozen, OURS: ours, THEIRS: theirs}.items()}


def measure(shape: Shape, kind: str, rounds: int) -> dict[str, Any]:
    """All methods on one shape in one format."""
    actions = steps(shape, kind)
    seconds = timed_in_turns(actions, rounds)
    return {
        "shape": shape.__dict__,
        "kind": kind,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "to_frozen": {name: median_ratio(times, seconds[FLOOR]) for name, times in seconds.items()},
        "to_lora": median_ratio(seconds[OURS], seconds[THEIRS]),
        "saved_bytes": {name: step.saved_bytes() for name, step in actions.items()},
    }


def report(measured: dict[str, Any]) -> list[str]:
    """The table, in Markdown."""
    lines = [__doc__ or "", measured["conditions"], ""]
    lines.append(
        "| layer | format | frozen, ms | LoRA r=32 / frozen | KronA / frozen | KronA / LoRA r=32 | target met "
        "| LoRA keeps | KronA keeps |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for one in measured["found"]:
        ratios, kept = one["to_frozen"], one["saved_bytes"]
        lines.append(
            f"| {one['shape']['name']} | {one['kind']} | {1e3 * one['seconds'][FLOOR]:.2f} | {ratios[THEIRS]:.2f} "
            f"| {ratios[OURS]:.2f} | {one['to_lora']:.2f} | {'yes' if one['to_lora'] <= 1 else 'no'} "
            f"| {kept[THEIRS] / 1e6:.1f} MB | {kept[OURS] / 1e6:.1f} MB |"
        )
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    kinds = [kind for kind, package in PACKAGES.items() if find_spec(package) is not None]
    found = [measure(shape, kind, arguments.rounds) for kind in kinds for shape in SHAPES]
    conditions = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    conditions += f", {arguments.rounds} rounds."
    measured = {"conditions": conditions, "found": found}
    text = "\n".join(report(measured))
    print(text)
    if not arguments.dry_run and found:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "quantized.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "quantized.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
