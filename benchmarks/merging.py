"""What merging costs by what it keeps, beside PEFT LoRA's merge: `python -m benchmarks.merging`.

A tenth of SDXL's attention projections, 56 layers of the same mix, in bf16 and fp32 on this machine's CPU: KronA
(4, 64) and PEFT LoRA r=4 on the same weights, each with an update of standard deviation 10⁻³. They merge and unmerge in
turns, in random order within a round; a ratio is the median over the rounds of one's time over LoRA's in the same
round. "Kept" are the bytes beside the weights that unmerging needs, "wrong" the weights that are not what they were
afterwards. `--cpu-time` takes the processor's time in place of the clock's, since other programs on the machine disturb
it less. Writes `benchmarks/results/merging.md`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffusekrona import KronAConfig, KronALayer, inject_krona, merge_krona, unmerge_krona

from .measuring import median_ratio

RESULT = Path(__file__).parent / "results" / "merging.md"
LAYERS = {(1280, 1280): 36, (640, 640): 6, (1280, 2048): 12, (640, 2048): 2}
"""(outputs, inputs) → how many of them."""
DTYPES = (torch.bfloat16, torch.float32)
DEVIATION = 1e-3
LORA = "PEFT LoRA r=4"


@dataclass
class Way:
    """A model on the common weights, and how it merges and unmerges."""

    model: nn.Module
    merge: Callable[[], Any]
    unmerge: Callable[[], Any]

    def kept_bytes(self) -> int:
        """What is kept beside the weights while they are merged; factors are not counted."""
        layers = (layer for layer in self.model.modules() if isinstance(layer, KronALayer))
        return sum(layer.restoration.nbytes for layer in layers)  # type: ignore[union-attr]


def on(weights: list[nn.Parameter]) -> nn.Sequential:
    """Linear layers of these weights."""
    layers = []
    for weight in weights:
        d, h = weight.shape
        layers.append(nn.Linear(h, d, bias=False, device="meta"))
        layers[-1].weight = weight
    return nn.Sequential(*layers)


def randomise(model: nn.Module, deviation: float) -> None:
    """Give every factor this standard deviation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "krona_" in name or "lora_" in name:
                parameter.normal_(std=deviation)


def ways(weights: list[nn.Parameter]) -> dict[str, Way]:
    """Ours by what it keeps, and PEFT's LoRA."""
    krona, lora = on(weights), on(weights)
    inject_krona(krona, KronAConfig(a1=4, a2=64, target_modules=r"\d+"))
    randomise(krona, DEVIATION**0.5)
    rank = 4
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=r"\d+"), lora)
    randomise(lora, (DEVIATION / rank**0.5) ** 0.5)
    peft: list[Any] = [layer for layer in lora.modules() if isinstance(layer, BaseTunerLayer)]
    found = {
        f"KronA (4, 64), exact={exact!r}": Way(
            krona, partial(merge_krona, krona, exact=exact), partial(unmerge_krona, krona)
        )
        for exact in (True, "copy", False)
    }
    found[LORA] = Way(lora, lambda: [layer.merge() for layer in peft], lambda: [layer.unmerge() for layer in peft])
    return found


def timed(action: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds that it takes."""
    began = clock()
    action()
    return clock() - began


def wrong(weights: list[nn.Parameter], originals: list[Tensor]) -> float:
    """The share of the entries that differ."""
    pairs = list(zip(weights, originals, strict=True))
    return sum(int((now != then).sum()) for now, then in pairs) / sum(then.numel() for then in originals)


@torch.no_grad()
def measure(dtype: torch.dtype, rounds: int, clock: Callable[[], float], share: int = 1) -> list[str]:
    """A table in Markdown; `share` divides the number of layers."""
    torch.manual_seed(0)
    sizes = [size for size, count in LAYERS.items() for _ in range(max(1, count // share))]
    weights = [nn.Parameter((torch.randn(d, h) * 0.03).to(dtype), requires_grad=False) for d, h in sizes]
    originals = [weight.clone() for weight in weights]
    methods, shuffle = ways(weights), random.Random(0)
    names = list(methods)
    seconds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in names} for what in ("merge", "unmerge")}
    kept, off = {}, {}
    for number in range(rounds + 1):
        shuffle.shuffle(names)
        for name in names:
            way = methods[name]
            for what, action in (("merge", way.merge), ("unmerge", way.unmerge)):
                taken = timed(action, clock)
                if number:  # what is done first does not count
                    seconds[what][name].append(taken)
                if what == "merge":
                    kept[name] = way.kept_bytes()
            off[name] = wrong(weights, originals)
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
    size = sum(weight.nbytes for weight in weights)
    lines = [
        "| | merge, ms | / LoRA | unmerge, ms | / LoRA | kept / weights | wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in methods:
        cells = []
        for of in seconds.values():
            cells += [f"{1e3 * statistics.median(of[name]):.0f}", f"{median_ratio(of[name], of[LORA]):.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {kept[name] / size:.1%} | {off[name]:.2%} |")
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="measure the processor's time")
    parser.add_argument("--dry-run", action="store_true", help="four layers; writes nothing")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*exact=False")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    of = "processor time" if arguments.cpu_time else "time by the clock"
    lines = [__doc__ or ""]
    lines += [f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds, {of}."]
    for dtype in DTYPES:
        lines += ["", f"## {dtype}", "", *measure(dtype, arguments.rounds, clock, 100 if arguments.dry_run else 1)]
    print("\n".join(lines))
    if not arguments.dry_run:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
