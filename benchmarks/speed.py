"""What a training step of one adapted layer costs beside the peers': `python -m benchmarks.speed`.

Every attention projection of SDXL at 1024², of Stable Diffusion 1.5 at 512², of a FLUX-like transformer and of FLUX.2
klein 4B at 512², whose single blocks have them fused with the feed-forward layers. In fp32 on this machine's CPU:
forward and backward, the input asking for its gradient as it does inside a network. All methods take turns in every
round, in random order; a ratio is the median over the rounds of one method's time over the frozen layer's in the same
round. "Saved" are the bytes kept for the backward pass, "peak" the most that is allocated at once, parameters left out
of both. What a method adds is that ratio minus one: `--today` measures just this for SDXL's layers, beside the order of
operations of the programs that build no ΔW. Writes `benchmarks/results/speed.md`, `.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from . import prediction
from .measuring import Shape, median_ratio, steps, timed_in_turns
from .methods import FACTORS, METHODS, TODAY, WAYS

RESULTS = Path(__file__).parent / "results"
SDXL = (
    Shape("SDXL 1280, self", tokens=1024, h=1280, d=1280, layers=360),
    Shape("SDXL 640, self", tokens=4096, h=640, d=640, layers=60),
    Shape("SDXL 1280, text", tokens=77, h=2048, d=1280, layers=120),
    Shape("SDXL 640, text", tokens=77, h=2048, d=640, layers=20),
)
SD15 = (
    Shape("SD 1.5 320, self", tokens=4096, h=320, d=320, layers=30),
    Shape("SD 1.5 640, self", tokens=1024, h=640, d=640, layers=30),
    Shape("SD 1.5 1280, self", tokens=256, h=1280, d=1280, layers=30),
    Shape("SD 1.5 1280, middle", tokens=64, h=1280, d=1280, layers=6),
    Shape("SD 1.5 320, text", tokens=77, h=768, d=320, layers=10),
    Shape("SD 1.5 640, text", tokens=77, h=768, d=640, layers=10),
    Shape("SD 1.5 1280, text", tokens=77, h=768, d=1280, layers=12),
)
FLUX = (Shape("FLUX-like 3072", tokens=4608, h=3072, d=3072, layers=1),)
KLEIN = (
    Shape("klein, image", tokens=1024, h=3072, d=3072, layers=20),
    Shape("klein, text", tokens=512, h=3072, d=3072, layers=20),
    Shape("klein, fused in", tokens=1536, h=3072, d=27648, layers=20),
    Shape("klein, fused out", tokens=1536, h=12288, d=3072, layers=20),
)
"""The 5 double and 20 single blocks of FLUX.2 klein 4B at 512², with 512 tokens of text, as PEFT's benchmark has it."""

MODELS = {"SDXL": SDXL, "SD 1.5": SD15, "FLUX-like": FLUX, "FLUX.2 klein": KLEIN}
HUGE = ("LyCORIS (4, 64) bypass", "B first (4, 64)")
"""Methods that take over ten GB on klein's fused layers."""

SLOW = (*FLUX, *KLEIN)
"""A round on these takes up to half a minute."""
FLOOR = "frozen base"


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """All methods on one shape."""
    actions = steps({name: method for name, method in METHODS.items() if shape not in KLEIN or name not in HUGE}, shape)
    seconds = timed_in_turns(actions, rounds)
    return {
        "shape": shape.__dict__,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": {name: median_ratio(times, seconds[FLOOR]) for name, times in seconds.items()},
        "saved_bytes": {name: step.saved_bytes() for name, step in actions.items()},
        "peak_bytes": {name: step.peak_bytes() for name, step in actions.items()},
    }


def mix(found: list[dict[str, Any]], what: str) -> dict[str, float]:
    """Sum over a model's layers."""
    return {name: sum(f["shape"]["layers"] * f[what][name] for f in found) for name in found[0][what]}


def mixed_ratio(found: list[dict[str, Any]]) -> dict[str, float]:
    """Time of all of a model's layers over the frozen ones', each shape's paired ratio weighted by its frozen time."""
    floor = [f["shape"]["layers"] * f["seconds"][FLOOR] for f in found]
    names = found[0]["ratio"]
    return {name: sum(w * f["ratio"][name] for w, f in zip(floor, found, strict=True)) / sum(floor) for name in names}


def shape_table(found: list[dict[str, Any]]) -> list[str]:
    """Ratios to the frozen layer, one column per shape."""
    names = [f["shape"]["name"] for f in found]
    lines = ["| step / frozen layer's | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    sizes = [f"{f['shape']['tokens']} × {f['shape']['h']} → {f['shape']['d']}" for f in found]
    lines.append("| *tokens × h → d* | " + " | ".join(sizes) + " |")
    lines.append("| *frozen layer, ms* | " + " | ".join(f"{1e3 * f['seconds'][FLOOR]:.2f}" for f in found) + " |")
    for method in found[0]["ratio"]:
        lines.append(f"| {method} | " + " | ".join(f"{f['ratio'][method]:.2f}" for f in found) + " |")
    return lines


def mix_table(found: list[dict[str, Any]]) -> list[str]:
    """All layers of one model together."""
    ratios, saved, peak = mixed_ratio(found), mix(found, "saved_bytes"), mix(found, "peak_bytes")
    lora = "PEFT LoRA r=4"
    lines = [
        "| all layers | step / frozen | step / LoRA r=4 | saved / LoRA r=4 | peak / LoRA r=4 |",
        "|---|---|---|---|---|",
    ]
    for name in ratios:
        lines.append(
            f"| {name} | {ratios[name]:.3f} | {ratios[name] / ratios[lora]:.3f} "
            f"| {saved[name] / saved[lora]:.3f} | {peak[name] / peak[lora]:.3f} |"
        )
    return lines


def draw(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Bars: the step over the frozen layer's, for each model."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    names = list(METHODS)[1:]
    width = 0.8 / len(groups)
    for number, (model, found) in enumerate(groups.items()):
        ratios = mixed_ratio(found)
        places = [i + (number - (len(groups) - 1) / 2) * width for i in range(len(names))]
        axis.barh(places, [ratios.get(name, 0) for name in names], height=0.93 * width, label=model)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("training step / frozen layers' step")
    axis.legend()
    figure.savefig(path, dpi=110)


def report(measured: dict[str, Any]) -> list[str]:
    """All tables, in Markdown; writes the pictures."""
    groups = measured["groups"]
    lines = [__doc__ or ""]
    for model, found in groups.items():
        lines += ["", f"## {model}", "", measured["conditions"][model], "", *mix_table(found), "", *shape_table(found)]
    ratios = {Shape(**f["shape"]): f["ratio"] for found in groups.values() for f in found}
    balance = prediction.fitted_balance(ratios)
    lines += ["", "## What each adds to SDXL's layers, beside today's programs", "", *today_table(measured)]
    lines += ["", "## What is counted", "", *prediction.counts_table(ratios)]
    lines += ["", "## What counting predicts", "", *prediction.table(ratios, balance)]
    prediction.draw(ratios, balance, RESULTS / "prediction.png")
    draw(groups, RESULTS / "speed.png")
    return lines


def measured_models(models: list[str], rounds: int, before: dict[str, Any]) -> dict[str, Any]:
    """What was measured before, with these models anew."""
    fewer = max(3, rounds // 3)
    groups, conditions = dict(before.get("groups", {})), dict(before.get("conditions", {}))
    for model in models:
        counts = [fewer if shape in SLOW else rounds for shape in MODELS[model]]
        groups[model] = [measure(shape, count) for shape, count in zip(MODELS[model], counts, strict=True)]
        conditions[model] = (
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {counts[0]} rounds."
        )
    return {"groups": groups, "conditions": conditions}


def measured_today(rounds: int, cpu_time: bool) -> dict[str, Any]:
    """Ours and today's programs' steps on SDXL's layers."""
    clock, of = (time.process_time, "processor time") if cpu_time else (time.perf_counter, "time by the clock")
    found = []
    for shape in SDXL:
        seconds = timed_in_turns(steps(TODAY, shape), rounds, clock)
        found.append(
            {
                "shape": shape.__dict__,
                "seconds": {name: statistics.median(times) for name, times in seconds.items()},
                "ratio": {name: median_ratio(times, seconds[FLOOR]) for name, times in seconds.items()},
            }
        )
    return {"found": found, "conditions": f"{torch.get_num_threads()} threads, {rounds} rounds, {of}."}


def today_table(measured: dict[str, Any]) -> list[str]:
    """Added cost beside added cost."""
    added = {name: ratio - 1 for name, ratio in mixed_ratio(measured["today"]["found"]).items()}
    ours, *others = WAYS
    columns = ["added / frozen step", ours, "PEFT LoRA r=4", *others, "ours / LoRA's", "ours / the others' least"]
    lines = [measured["today"]["conditions"], "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in FACTORS:
        mine, lora = added[f"{ours}, {name}"], added["PEFT LoRA r=4"]
        peers = [added[f"{way}, {name}"] for way in others]
        cells = [mine, lora, *peers, mine / lora, mine / min(peers)]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", choices=MODELS, action="append", help="measure only this one, and keep the others")
    parser.add_argument("--today", action="store_true", help="measure just the steps of today's programs")
    parser.add_argument("--cpu-time", action="store_true", help="of these, the processor's time")
    parser.add_argument("--tables-only", action="store_true", help="write the tables again from the last measurements")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    stored = RESULTS / "speed.json"
    some = arguments.tables_only or arguments.model or arguments.today
    measured = json.loads(stored.read_text(encoding="utf-8")) if some else {}
    if not arguments.tables_only:
        if arguments.model or not some:
            measured |= measured_models(arguments.model or list(MODELS), arguments.rounds, measured)
        if arguments.today or not some:
            measured["today"] = measured_today(arguments.rounds, arguments.cpu_time)
        stored.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(report(measured))
    print(text)
    (RESULTS / "speed.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
