"""How soon an adapter of SDXL is ready in a store: `python -m benchmarks.store`.

SDXL's UNet, whose frozen weights take no memory here, as nothing is computed with them; adapters (4, 64) in bf16, of
7.7 MB, whose files were just written, so that the system has them in memory. Milliseconds from asking `AdapterStore`
for an adapter until it may be drawn with, medians: one that was not in memory, and eight of a batch; beside
`load_krona`, and Diffusers' `load_lora_adapter` for a LoRA of rank 4 whose tensors are read already. The first adapters
of a shape, for which the store makes places in the model, are told apart. Writes `benchmarks/results/store.md`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffusekrona import AdapterStore, KronAConfig, inject_krona, load_krona, save_krona, unload_krona
from diffusekrona.bases.architectures import build

RESULT = Path(__file__).parent / "results" / "store.md"
ADAPTERS, BATCH = 28, 8


def weightless(config: Any) -> UNet2DConditionModel:
    """A UNet whose weights are zeros that take no memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    zero = torch.zeros((), dtype=torch.bfloat16)
    for module in unet.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(zero.expand(weight.shape), requires_grad=False))
    return unet.eval()


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def write_adapters(unet: Any, folder: Path) -> None:
    """Our adapters, and LoRAs in a folder of their own."""
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        krona = inject_krona(unet, KronAConfig(a1=4, a2=64, init_weights=False))
        for factor in krona.parameters():
            factor.data = factor.data.bfloat16()
        save_krona(unet, folder / f"subject{number}.safetensors")
        unload_krona(unet)
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    tensors = {name: tensor.bfloat16() for name, tensor in get_peft_model_state_dict(unet).items()}
    save_file(tensors, folder / "lora.safetensors")
    unet.delete_adapters("default")


def main() -> None:
    """Measure, print and write the table."""
    config = build("sdxl").config
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(weightless(config), folder)
        rows: dict[str, list[float]] = {}
        store = AdapterStore(weightless(config), folder)
        names = [f"subject{number}" for number in range(ADAPTERS)]

        def batch(some: list[str]) -> None:
            with store.batch(some):
                pass

        rows["store, the first of a shape"] = [seconds(lambda: batch(names[:1]))]
        rows["store, the first batch of eight"] = [seconds(lambda: batch(names[:BATCH]))]
        rows["store, one more, read"] = [seconds(lambda one=one: store.load(one)) for one in names[BATCH : BATCH + 6]]
        rows["store, one more, read and put into a batch"] = [
            seconds(lambda one=one: batch([one])) for one in names[BATCH + 6 : BATCH + 12]
        ]
        rows["store, eight more in a batch"] = [seconds(lambda: batch(names[BATCH + 12 :]))]
        rows["store, eight that are in memory"] = [seconds(lambda: batch(names[:BATCH])) for _ in range(9)]
        plain = weightless(config)
        rows["load_krona"] = [
            seconds(lambda one=one: load_krona(plain, folder / f"{one}.safetensors", one)) for one in names[:6]
        ]
        lora, lora_file = weightless(config), load_file(folder / "lora.safetensors")
        rows["load_lora_adapter (PEFT, Diffusers)"] = [
            seconds(lambda one=one: lora.load_lora_adapter(lora_file, prefix=None, adapter_name=one))
            for one in names[:6]
        ]
    lines = ["| | ms |", "|---|---|"]
    lines += [f"| {name} | {1000 * statistics.median(taken):.0f} |" for name, taken in rows.items()]
    print("\n".join(lines))
    RESULT.write_text(f"{__doc__}\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
