"""Injecting, loading, switching, merging and unmerging in the full-size SDXL UNet: `python -m benchmarks.lifecycle`.

Random weights in bf16 and fp32 on this machine's CPU; KronA (4, 64), PEFT LoRA r=4 and PEFT LoKr factor 8 on all 560
attention projections. They take turns in every round; the medians are given, and what reading and writing the same
weights once takes (`w.mul_(1)`). Needs 16 GB of memory; `--dry-run` goes through the same motions with a tiny UNet.
Writes `benchmarks/results/lifecycle.md`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_krona, save_krona, unload_krona, unmerge_krona

from .sdxl_step import build

RESULT = Path(__file__).parent / "results" / "lifecycle.md"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
STAGES = ("inject", "merge", "unmerge", "switch", "load", "merge and unload")
LORA_FILE = "pytorch_lora_weights.safetensors"
Timings = dict[str, float]


def timed(action: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def randomise(unet: nn.Module) -> None:
    """Trained factors are not zero."""
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)


def tuner_layers(unet: nn.Module) -> list[BaseTunerLayer]:
    """The layers that hold adapters."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def merge_and_unload(unet: UNet2DConditionModel, config: PeftConfig) -> Timings:
    """PEFT's way of merging for good."""
    vars(unet).pop("peft_config", None)  # which Diffusers leaves behind, empty
    model: Any = get_peft_model(unet, config)
    randomise(unet)
    return {"merge and unload": timed(model.merge_and_unload)}


def krona(unet: UNet2DConditionModel, folder: Path) -> Timings:
    """Ours, by its helpers."""
    config = KronAConfig(a1=4, a2=64)
    seconds = {"inject": timed(lambda: inject_krona(unet, config))}
    randomise(unet)
    saved = save_krona(unet, folder / "krona")
    seconds["merge"] = timed(lambda: merge_krona(unet))
    seconds["unmerge"] = timed(lambda: unmerge_krona(unet))
    inject_krona(unet, config, adapter_name="second")
    seconds["switch"] = timed(lambda: unet.set_adapter("default"))
    unload_krona(unet)
    seconds["load"] = timed(lambda: load_krona(unet, saved))
    unload_krona(unet)
    return seconds | merge_and_unload(unet, config)


def lora(unet: UNet2DConditionModel, folder: Path) -> Timings:
    """PEFT's LoRA, by Diffusers' own methods."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)
    seconds = {"inject": timed(lambda: unet.add_adapter(config))}
    randomise(unet)
    unet.save_lora_adapter(folder / "lora", weight_name=LORA_FILE)
    seconds["merge"] = timed(lambda: unet.fuse_lora())
    seconds["unmerge"] = timed(lambda: unet.unfuse_lora())
    unet.add_adapter(config, adapter_name="second")
    seconds["switch"] = timed(lambda: unet.set_adapter("default"))
    unet.unload_lora()
    seconds["load"] = timed(lambda: unet.load_lora_adapter(folder / "lora", weight_name=LORA_FILE, prefix=None))
    unet.unload_lora()
    return seconds | merge_and_unload(unet, config)


def lokr(unet: UNet2DConditionModel, folder: Path) -> Timings:
    """PEFT's LoKr. Diffusers has no methods for it, so only PEFT's part is timed."""
    config: PeftConfig = LoKrConfig(r=100_000, alpha=100_000, decompose_factor=8, target_modules=TARGETS)
    seconds = {"inject": timed(lambda: inject_adapter_in_model(config, unet))}
    randomise(unet)
    layers = tuner_layers(unet)
    seconds["merge"] = timed(lambda: [layer.merge() for layer in layers])
    seconds["unmerge"] = timed(lambda: [layer.unmerge() for layer in layers])
    for name, module in list(unet.named_modules()):
        if isinstance(module, BaseTunerLayer):
            unet.set_submodule(name, module.get_base_layer())
    del unet.peft_config
    return seconds | merge_and_unload(unet, config)


def touch_weights(unet: nn.Module) -> float:
    """Seconds to read and write the adapted weights once."""
    weights = [m.weight for name, m in unet.named_modules() if isinstance(m, nn.Linear) and ".attn" in name]
    with torch.no_grad():
        return timed(lambda: [weight.mul_(1) for weight in weights])


def measure(unet: nn.Module, rounds: int) -> list[str]:
    """A table in Markdown. What is done first, once, does not count."""
    methods = {"KronA (4, 64)": krona, "PEFT LoRA r=4": lora, "PEFT LoKr factor 8": lokr}
    found: dict[str, list[Timings]] = {name: [] for name in methods}
    touched, order, shuffle = [], list(methods), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds + 1):
            touched.append(touch_weights(unet))
            shuffle.shuffle(order)
            for name in order:
                found[name].append(methods[name](unet, Path(folder)))
    lines = ["| seconds | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for name, timings in found.items():
        cells = [statistics.median(t[stage] for t in timings[1:]) if stage in timings[0] else None for stage in STAGES]
        lines.append(f"| {name} | " + " | ".join("–" if cell is None else f"{cell:.3f}" for cell in cells) + " |")
    return [*lines, "", f"`w.mul_(1)` over the same weights: {statistics.median(touched[1:]):.3f} s."]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true", help="a tiny UNet; writes nothing")
    arguments = parser.parse_args()
    unet, _ = build(arguments.dry_run, "cpu")
    lines = [__doc__ or "", f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds."]
    for dtype in (torch.bfloat16, torch.float32):
        lines += ["", f"## {dtype}", "", *measure(unet.to(dtype), arguments.rounds)]
    print("\n".join(lines))
    if not arguments.dry_run:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
