"""Whole SDXL training steps at 1024² beside the peers': `python -m benchmarks.sdxl_step`.

The full-size UNet with random weights (speed does not depend on them) in bf16, adapters in fp32 under autocast,
gradient checkpointing, one latent per step; all methods share one set of frozen weights and take turns in every
round. Memory is what a step allocates at most, beyond the weights. Needs a GPU of 16 GB; `--dry-run` goes through
the same motions with a tiny UNet on the CPU, whose numbers mean nothing. Writes `benchmarks/results/sdxl_step.md`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffusekrona.bases import architectures

from .measuring import median_ratio, timed_in_turns
from .methods import METHODS, Method

RESULT = Path(__file__).parent / "results" / "sdxl_step.md"
CHOSEN = (
    "frozen base",
    "KronA (4, 64)",
    "KronA (8, 8)",
    "PEFT LoRA r=4",
    "PEFT LoKr factor 8",
    "LyCORIS factor 8 rebuild",
    "LyCORIS factor 8 bypass",
)
TINY = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 1280 + 6 * 8,
}


def with_method(unet: nn.Module, method: Method) -> nn.Module:
    """A copy that shares the frozen weights, with the method on every attention projection."""
    memo = {id(tensor): tensor for tensor in unet.parameters()}
    twin = copy.deepcopy(unet, memo)
    for name, module in list(twin.named_modules()):
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            parent, _, child = name.rpartition(".")
            wrapped = method(module)
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(module.weight.device, torch.float32)
            setattr(twin.get_submodule(parent), child, wrapped)
    return twin


class TrainingStep:
    """Forward and backward of the whole UNet."""

    def __init__(self, unet: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.unet, self.inputs, self.device = unet, inputs, inputs["sample"].device
        self.trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]

    def __call__(self) -> None:
        for parameter in self.trained:
            parameter.grad = None
        sample = self.inputs["sample"].detach().requires_grad_()  # so that the frozen UNet has a backward pass, too
        with torch.autocast(self.device.type, torch.bfloat16):
            answer = self.unet(
                sample,
                self.inputs["timestep"],
                self.inputs["text"],
                added_cond_kwargs={"text_embeds": self.inputs["pooled"], "time_ids": self.inputs["time_ids"]},
            ).sample
        answer.float().square().mean().backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """The most that a step allocates beyond what was there before; 0 on a CPU, where it is not counted."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return torch.cuda.max_memory_allocated() - before


def build(tiny: bool, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The frozen UNet and what it is given."""
    torch.manual_seed(0)
    if tiny:
        unet: nn.Module = UNet2DConditionModel(**TINY).to(torch.bfloat16)
    else:
        unet = architectures.build("sdxl", device, torch.bfloat16)
    unet.requires_grad_(False)
    unet.train()
    unet.enable_gradient_checkpointing()
    side, text = (16, 128) if tiny else (128, 2048)
    made = {
        "sample": torch.randn(1, 4, side, side),
        "text": torch.randn(1, 77, text),
        "pooled": torch.randn(1, 1280),
        "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]),
    }
    inputs = {name: tensor.to(device, torch.bfloat16) for name, tensor in made.items()}
    return unet, inputs | {"timestep": torch.tensor([500], device=device)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="a tiny UNet on the CPU; writes nothing")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("No CUDA device: nothing measured. `--dry-run` shows that the benchmark runs.")
        return
    began = time.monotonic()
    unet, inputs = build(arguments.dry_run, "cpu" if arguments.dry_run else "cuda")
    steps = {name: TrainingStep(with_method(unet, METHODS[name]), inputs) for name in CHOSEN}
    seconds = timed_in_turns(steps, arguments.rounds)
    peaks = {name: step.peak_bytes() for name, step in steps.items()}
    lora, floor = seconds["PEFT LoRA r=4"], seconds["frozen base"]
    device = "a CPU, dry run" if arguments.dry_run else torch.cuda.get_device_name()
    lines = [
        __doc__ or "",
        f"{device}, torch {torch.__version__}, {arguments.rounds} rounds.",
        "",
        "| | trained parameters | ms a step | / frozen | / LoRA r=4 | peak, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, step in steps.items():
        count = sum(parameter.numel() for parameter in step.trained)
        times = seconds[name]
        lines.append(
            f"| {name} | {count:,} | {1e3 * statistics.median(times):.1f} | {median_ratio(times, floor):.3f} "
            f"| {median_ratio(times, lora):.3f} | {peaks[name] / 1e9:.2f} |"
        )
    print("\n".join(lines), f"\n{time.monotonic() - began:.0f} s in all")
    if not arguments.dry_run:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
