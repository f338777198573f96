"""What the training loop adds to the model's own work: `python -m benchmarks.training`.

The repository's small base, KronA (2, 4) in its attention, fp32, everything cached. The model's own work is the UNet's
forward pass, the backward pass, gradient clipping and AdamW's step, timed where they begin and end; the rest of each
step is the loop's: drawing images, noise and levels, averages, the schedule, reports, and the check that all is finite.
Writes `benchmarks/results/training.md`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline

from diffusekrona import KronAConfig, inject_krona
from diffusekrona.training import ImagePlan, TrainingConfig, fit, load_folder

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "training.md"
STEPS, ROUNDS = 30, 7


@contextmanager
def timed(pipe: Any) -> Iterator[list[float]]:
    """The seconds of each call that is the model's own work."""
    seconds: list[float] = []

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            seconds.append(time.perf_counter() - began)
            return result

        return call

    with (
        patch.object(pipe.unet, "forward", clocked(pipe.unet.forward)),
        patch.object(torch.Tensor, "backward", clocked(torch.Tensor.backward)),
        patch.object(torch.optim.AdamW, "step", clocked(torch.optim.AdamW.step)),
        patch.object(Accelerator, "clip_grad_norm_", clocked(Accelerator.clip_grad_norm_)),
    ):
        yield seconds


def main() -> None:
    """Measure, print and write the table."""
    lines = ["| batch | a step, ms | the loop's part, ms | share |", "|---|---|---|---|"]
    for batch in (1, 4, 8):
        pipe = StableDiffusionXLPipeline.from_pretrained(ROOT / "models" / "emoji-sdxl", dtype=torch.float32)
        krona = inject_krona(pipe, KronAConfig(a1=2, a2=4))
        images = load_folder(
            ROOT / "examples" / "toy-bear", "a sks toy", ImagePlan(pipe.unet.config.sample_size * pipe.vae_scale_factor)
        )
        config = TrainingConfig(max_train_steps=STEPS, train_batch_size=batch, learning_rate=1e-5)
        steps, rests = [], []
        for _ in range(ROUNDS):
            with timed(pipe) as own:
                whole = fit(pipe, images, dict(krona.named_parameters()), config).seconds
            steps.append(1000 * whole / STEPS)
            rests.append(1000 * (whole - sum(own)) / STEPS)
        share = statistics.median(rest / step for rest, step in zip(rests, steps, strict=True))
        lines.append(f"| {batch} | {statistics.median(steps):.1f} | {statistics.median(rests):.2f} | {share:.1%} |")
    table = "\n".join(lines) + "\n"
    print(table)
    RESULT.write_text(f"{__doc__}\n{table}", encoding="utf-8")


if __name__ == "__main__":
    main()
