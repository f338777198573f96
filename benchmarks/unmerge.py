"""How many weights an exact unmerge has to keep: `python -m benchmarks.unmerge`.

One 1280 × 1280 projection, W ~ N(0, 0.03²), (a1, a2) = (4, 64), for updates of several sizes. Beside the library's
record stand the plain way, a full copy, and what is wrong after PEFT LoRA's own merge and unmerge of an update of
the same size. Writes `benchmarks/results/unmerge.md`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from diffusekrona import KronALayer

SIZE = 1280
DEVIATIONS = (1e-5, 1e-4, 1e-3, 1e-2)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RESULT = Path(__file__).parent / "results" / "unmerge.md"


def projection(dtype: torch.dtype) -> nn.Linear:
    """A projection with SDXL-like weights."""
    layer = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)
    nn.init.normal_(layer.weight, std=0.03)
    return layer


def kept_by_krona(dtype: torch.dtype, deviation: float) -> tuple[float, float]:
    """Share of the entries kept, and the record's bytes over a copy's."""
    layer = KronALayer(projection(dtype))
    layer.update_layer("default", 4, 64)
    nn.init.normal_(layer.krona_A["default"], std=deviation**0.5)
    nn.init.normal_(layer.krona_B["default"], std=deviation**0.5)
    before = layer.weight.detach().clone()
    layer.merge()
    record = layer.restoration
    assert record is not None
    layer.unmerge()
    assert torch.equal(before, layer.weight)
    return record.entries / before.numel(), record.nbytes / before.nbytes


def changed_by_lora(dtype: torch.dtype, deviation: float) -> float:
    """Share of the entries that differ after PEFT LoRA merged and unmerged an update of this standard deviation."""
    rank = 4
    config = LoraConfig(r=rank, lora_alpha=rank)
    layer = LoraLinear(projection(dtype), "default", config=config, r=rank, lora_alpha=rank)
    for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        nn.init.normal_(factor, std=(deviation / rank**0.5) ** 0.5)
    before: Tensor = layer.weight.detach().clone()
    layer.merge()
    layer.unmerge()
    return float((before != layer.weight).float().mean())


def main() -> None:
    """Measure, print and write the table."""
    torch.manual_seed(0)
    lines = [
        "| ΔW's deviation | dtype | entries kept | record / full copy | wrong after PEFT LoRA's unmerge |",
        "|---|---|---|---|---|",
    ]
    for deviation in DEVIATIONS:
        for dtype in DTYPES:
            entries, size = kept_by_krona(dtype, deviation)
            wrong = changed_by_lora(dtype, deviation)
            name = str(dtype).removeprefix("torch.")
            lines.append(f"| {deviation:g} | {name} | {entries:.2%} | {size:.1%} | {wrong:.2%} |")
    table = "\n".join(lines) + "\n"
    print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(f"{__doc__}\n{table}", encoding="utf-8")


if __name__ == "__main__":
    main()
