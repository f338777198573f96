"""Training several subjects in one another's batches: `OMP_NUM_THREADS=1 python -m benchmarks.train_many`.

`train_many` with four subjects, at once or one after the other, in processes of their own and in turns: on the
repository's small base (KronA (2, 4), fp32, 64 x 64 pixels), and on a UNet with all of SDXL's layers and random weights
(KronA (4, 64), bf16, 256 x 256 pixels), batch 1 for each subject. Times are seconds of CPU from the first step to the
last, medians over the rounds, so that what else runs on the machine counts little; memory is the peak of resident
memory. Needs Linux, 12 GB of memory and 6 GB of disk. Writes `benchmarks/results/train_many.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .training_memory import resident_peak

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "train_many.md"
SMALL = ROOT / "models" / "emoji-sdxl"
PICTURES = ROOT / "examples" / "toy-bear"
SUBJECTS = 4
USUAL_STEPS = 500
"""Steps of a subject, for subjects in an hour."""


@dataclass(frozen=True)
class Case:
    """A base, and how its subjects are trained."""

    name: str
    steps: int
    rounds: int
    settings: dict[str, Any]


CASES = (
    Case("the small base", 30, 3, {"a1": 2, "a2": 4}),
    Case("SDXL's layers", 4, 2, {"a1": 4, "a2": 64, "resolution": 256, "mixed_precision": "bf16", "cache": "memory"}),
)


def save_sdxl(folder: Path) -> None:
    """A pipeline with SDXL's UNet, random weights in bf16, and small models around it."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from diffusekrona.bases.architectures import build

    small = StableDiffusionXLPipeline.from_pretrained(SMALL)
    configs = small.text_encoder.config, small.text_encoder_2.config
    for config, width in zip(configs, (768, 1280), strict=True):
        config.hidden_size, config.intermediate_size, config.projection_dim = width, width, width
        config.num_attention_heads, config.num_hidden_layers = width // 64, 2
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 64, 64),
            scaling_factor=0.13025,
        ),
        text_encoder=CLIPTextModel(configs[0]),
        text_encoder_2=CLIPTextModelWithProjection(configs[1]),
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer_2,
        unet=UNet2DConditionModel.from_config(build("sdxl").config),
        scheduler=small.scheduler,
    ).save_pretrained(folder)


def run(case: Case, base: Path, at_once: int) -> None:
    """Train the subjects in this process, and print what they took."""
    from diffusekrona.training.many import train_many
    from diffusekrona.training.subjects import find_subjects

    moments: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for number in range(SUBJECTS):
            (place / "subjects").mkdir(exist_ok=True)
            (place / "subjects" / f"toy{number}").symlink_to(PICTURES, target_is_directory=True)
        shared = {
            "pretrained_model_name_or_path": str(base),
            "instance_prompt": "a {name} toy",
            "max_train_steps": case.steps,
            "learning_rate": 1e-5,
            "checkpointing_steps": 10_000,
            **case.settings,
        }
        subjects = find_subjects(place / "subjects", place / "out", shared)
        train_many(subjects, at_once, on_step=lambda name, done: moments.append((done.step, time.process_time())))
    # Before a subject's first step, its pictures are encoded.
    taken = [now - before for (_, before), (step, now) in pairwise(moments) if step > 1]
    seconds = sum(taken) / len(taken)
    print(json.dumps({"seconds": seconds, "memory": resident_peak()}))


def measured(number: int, base: Path, at_once: int) -> dict[str, float]:
    """What a process of its own took."""
    command = [sys.executable, "-m", "benchmarks.train_many", "--case", str(number), "--base", str(base)]
    done = subprocess.run([*command, "--at-once", str(at_once)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print and write the table."""
    lines = [
        "| base | subjects at once | s for a subject's step | over one at a time | subjects an hour | memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            base = SMALL if number == 0 else Path(folder)
            if number:
                save = "from pathlib import Path; from benchmarks.train_many import save_sdxl; import sys; "
                save += "save_sdxl(Path(sys.argv[1]))"
                subprocess.run([sys.executable, "-c", save, folder], cwd=ROOT, check=True, capture_output=True)
            found: dict[int, list[dict[str, float]]] = {1: [], SUBJECTS: []}
            for _ in range(case.rounds):
                for at_once, results in found.items():
                    results.append(measured(number, base, at_once))
            alone = statistics.median(one["seconds"] for one in found[1])
            for at_once, results in found.items():
                seconds = statistics.median(one["seconds"] for one in results)
                memory = statistics.median(one["memory"] for one in results)
                hour = 3600 / seconds / USUAL_STEPS
                lines.append(
                    f"| {case.name} | {at_once} | {seconds:.3f} | {seconds / alone:.2f} | {hour:.1f} | {memory:.0f} |"
                )
                print(lines[-1], flush=True)
    note = f"Subjects an hour: of {USUAL_STEPS} steps each, on one core."
    RESULT.write_text(f"{__doc__}\n" + "\n".join(lines) + f"\n\n{note}\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=int)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--at-once", type=int)
    given = parser.parse_args()
    if given.case is None:
        main()
    else:
        run(CASES[given.case], given.base, given.at_once)
