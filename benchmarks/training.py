"""What the training loop adds to the model's own work: `python -m benchmarks.training`.

The repository's small base, KronA (2, 4) in its attention, fp32. "Bare" is forward pass, loss, backward pass, gradient
clipping and AdamW on tensors that are there already; "trainer" is `fit` with its caches filled: drawing images, noise
and levels, averages, the learning rate's schedule, reports, and the check that all is finite. Both in turns.
Writes `benchmarks/results/training.md`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline

from benchmarks.measuring import median_ratio
from diffusekrona import KronAConfig, inject_krona
from diffusekrona.training import ImagePlan, TrainingConfig, fit, load_folder
from diffusekrona.training.families import family_of

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "training.md"
STEPS, ROUNDS = 30, 9


def bare(pipe: Any, parameters: list[torch.nn.Parameter], batch: int) -> Callable[[], float]:
    """Seconds of so many steps of nothing but the model's own work."""
    family = family_of(pipe)
    latents, noise = torch.randn(2, batch, 4, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    text, sizes = family.example(batch), torch.full((batch, 6), 64.0)
    text = {name: torch.randn_like(tensor) for name, tensor in text.items()}
    timesteps = torch.randint(1000, (batch,))
    noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, timesteps)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def run() -> float:
        pipe.unet.train()
        began = time.perf_counter()
        for _ in range(STEPS):
            (family.predict(noisy, timesteps, text, sizes) - noise).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return run


def trainer(pipe: Any, parameters: dict[str, torch.nn.Parameter], batch: int) -> Callable[[], float]:
    """Seconds of so many steps of `fit`, encoding left out."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images = load_folder(ROOT / "examples" / "toy-bear", "a sks toy", ImagePlan(size))
    config = TrainingConfig(max_train_steps=STEPS, train_batch_size=batch, learning_rate=1e-5)
    return lambda: fit(pipe, images, parameters, config).seconds


def main() -> None:
    """Measure, print and write the table."""
    lines = ["| batch | bare, ms a step | trainer, ms a step | trainer / bare |", "|---|---|---|---|"]
    for batch in (1, 4, 8):
        pipe = StableDiffusionXLPipeline.from_pretrained(ROOT / "models" / "emoji-sdxl", dtype=torch.float32)
        krona = inject_krona(pipe, KronAConfig(a1=2, a2=4))
        actions = {
            "bare": bare(pipe, list(krona.parameters()), batch),
            "trainer": trainer(pipe, dict(krona.named_parameters()), batch),
        }
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for action in actions.values():
            action()
        for _ in range(ROUNDS):
            for name, action in actions.items():
                seconds[name].append(action())
        medians = {name: 1000 * statistics.median(values) / STEPS for name, values in seconds.items()}
        ratio = median_ratio(seconds["trainer"], seconds["bare"])
        lines.append(f"| {batch} | {medians['bare']:.1f} | {medians['trainer']:.1f} | {ratio:.3f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    RESULT.write_text(f"{__doc__}\n{table}", encoding="utf-8")


if __name__ == "__main__":
    main()
