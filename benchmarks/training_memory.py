"""Memory of training beside Diffusers' DreamBooth LoRA scripts: `python -m benchmarks.training_memory --peers PATH`.

PATH is the folder `examples/dreambooth` of Diffusers' repository, in the version that is installed, with
`train_dreambooth_lora_sdxl.py` and `train_dreambooth_lora_flux2_klein.py`: https://github.com/huggingface/diffusers.
`diffusekrona train` with factors (4, 64) ((2, 4) on the small base, whose layers are 64 wide) and the script with rank
4 run as processes of their own, in turns, on the CPU, with the same base, images, prompt, batch, steps and precision,
AdamW, no validation. Bases: the repository's small one; one of SDXL's shape at 0.4 times its width, and one of FLUX.2
klein's with half of its layers and 0.42 times its width, both with random weights, where weights dominate as they do
in real use.

All numbers are peaks of resident memory in MB as Linux counts them, mapped files included, medians over the rounds:
before the first step (loading, encoding), from then to the end of the last step, and of the whole process. At the end
the script loads the pipeline once more to try it out, which only its whole process shows. Needs Linux, 6 GB of memory
and 4 GB of disk. Writes `benchmarks/results/training_memory.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "training_memory.md"
SMALL = ROOT / "models" / "emoji-sdxl"
IMAGES = ROOT / "examples" / "toy-bear"
STEPS = 4
WIDTH = 0.4
"""Width of the large base over SDXL's."""


@dataclass(frozen=True)
class Case:
    """A run that both programs do."""

    name: str
    base: Path
    images: Path
    resolution: int
    batch: int
    factors: tuple[int, int]
    half: bool = False
    script: str = "train_dreambooth_lora_sdxl.py"


@dataclass
class Peaks:
    """Peaks of resident memory in MB."""

    before: float = 0.0
    steps: float = 0.0
    whole: float = 0.0


def ours(case: Case, output: Path) -> list[str]:
    """`diffusekrona train`."""
    options = {
        "base": case.base,
        "images": case.images,
        "prompt": "a sks toy",
        "output": output,
        "resolution": case.resolution,
        "train-batch-size": case.batch,
        "max-train-steps": STEPS,
        "a1": case.factors[0],
        "a2": case.factors[1],
        "mixed-precision": "bf16" if case.half else "no",
        "dtype": "bfloat16" if case.half else "float32",
    }
    return ["diffusekrona.cli", "train", *_flags(options)]


def peer(script: Path, case: Case, output: Path) -> list[str]:
    """Diffusers' script."""
    options = {
        "pretrained_model_name_or_path": case.base,
        "instance_data_dir": case.images,
        "instance_prompt": "a sks toy",
        "output_dir": output,
        "resolution": case.resolution,
        "train_batch_size": case.batch,
        "max_train_steps": STEPS,
        "rank": 4,
        "mixed_precision": "bf16" if case.half else "no",
        "seed": 0,
    }
    layers = ["--text_encoder_out_layers", "9", "18", "27"] if "klein" in case.script else []  # as the pipeline has it
    return [str(script), *_flags(options), "--center_crop", *layers]


def _flags(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def measure(program: Sequence[str]) -> Peaks:
    """Run a program in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "peaks.json"
        command = [sys.executable, "-m", "benchmarks.training_memory", "--measure", str(told), *program]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        if done.returncode or not told.is_file():
            raise SystemExit(f"{' '.join(program)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return Peaks(**json.loads(told.read_text()))


def run_measured(told: Path, program: Sequence[str]) -> None:
    """Run a script or a module in this process, and write its peaks."""
    import torch
    from diffusers import Flux2Transformer2DModel, UNet2DConditionModel

    if find_spec("torchvision") is None:
        from .torchvision_stand_in import install

        install()
    peaks = Peaks()

    def begin() -> None:
        if not peaks.before:
            peaks.before = resident_peak()
            Path("/proc/self/clear_refs").write_text("5")  # starts counting the peak again

    def stepped() -> None:
        peaks.steps = resident_peak()

    for denoiser in (UNet2DConditionModel, Flux2Transformer2DModel):
        denoiser.forward = _around(denoiser.forward, before=begin)
    torch.optim.AdamW.step = _around(torch.optim.AdamW.step, after=stepped)  # type: ignore[method-assign]
    sys.argv = list(program)
    try:
        if program[0].endswith(".py"):
            runpy.run_path(program[0], run_name="__main__")
        else:
            runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:  # with which typer ends
        if error.code:
            raise
    peaks.whole = max(peaks.before, resident_peak())
    told.write_text(json.dumps(vars(peaks)))


def _around(
    function: Callable[..., Any], before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        result = function(*args, **kwargs)
        if after is not None:
            after()
        return result

    return call


def resident_peak() -> float:
    """Most resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def save_large_base(folder: Path) -> None:
    """A pipeline of SDXL's shape with random weights, `WIDTH` times as wide, with the small base's tokenizers."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from diffusekrona.bases.architectures import build

    torch.manual_seed(0)
    small = StableDiffusionXLPipeline.from_pretrained(SMALL)
    text, text_2 = small.text_encoder.config, small.text_encoder_2.config
    _resize(text, width=320, layers=12)
    _resize(text_2, width=512, layers=32)
    shape = {
        **build("sdxl").config,
        "block_out_channels": tuple(int(WIDTH * width) for width in (320, 640, 1280)),
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": 320 + 512,
        "projection_class_embeddings_input_dim": 6 * 256 + 512,
    }
    unet = UNet2DConditionModel.from_config(shape)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        scaling_factor=0.13025,
    )
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text_2),
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer_2,
        unet=unet,
        scheduler=small.scheduler,
    ).save_pretrained(folder)


def save_klein_base(folder: Path) -> None:
    """FLUX.2 klein with random weights: 2 and 10 blocks, 1280 wide; its text encoder and autoencoder are tiny."""
    import torch
    from diffusers import Flux2Transformer2DModel

    from tests.pipelines import tiny_klein_pipeline

    pipe = tiny_klein_pipeline()
    sizes = {"num_layers": 2, "num_single_layers": 10, "attention_head_dim": 64, "num_attention_heads": 20}
    torch.manual_seed(0)
    pipe.transformer = Flux2Transformer2DModel(**{**pipe.transformer.config, **sizes, "axes_dims_rope": (16,) * 4})
    pipe.save_pretrained(folder)


def _resize(config: Any, width: int, layers: int) -> None:
    config.hidden_size, config.intermediate_size, config.projection_dim = width, 4 * width, width
    config.num_hidden_layers, config.num_attention_heads = layers, width // 64


def main() -> None:
    """Measure, print and write the table; with `--measure`, be one of the measured processes."""
    if sys.argv[1:2] == ["--measure"]:
        run_measured(Path(sys.argv[2]), sys.argv[3:])
        return
    arguments = _arguments()
    if arguments.peers is None:
        print("Nothing measured: give the folder of Diffusers' scripts with --peers PATH; --help says which.")
        return
    lines = [
        "| base, batch, precision | | before the steps | steps | whole process |", "|---|---|---|---|---|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        large, klein = Path(folder) / "large", Path(folder) / "klein"
        save_large_base(large)
        save_klein_base(klein)
        of_klein = "train_dreambooth_lora_flux2_klein.py"
        images = Path(folder) / "images"  # without captions, which the script takes for images
        shutil.copytree(IMAGES, images, ignore=shutil.ignore_patterns("*.txt"))
        cases = [
            Case("small base, 64², batch 1, fp32", SMALL, images, 64, 1, (2, 4)),
            Case("small base, 64², batch 4, fp32", SMALL, images, 64, 4, (2, 4)),
            Case("large base, 256², batch 1, fp32", large, images, 256, 1, (4, 64)),
            Case("large base, 256², batch 1, bf16", large, images, 256, 1, (4, 64), half=True),
            Case("klein, 256², batch 1, fp32", klein, images, 256, 1, (4, 64), script=of_klein),
            Case("klein, 256², batch 1, bf16", klein, images, 256, 1, (4, 64), half=True, script=of_klein),
        ]
        for case in cases:
            found: dict[str, list[Peaks]] = {"`diffusekrona train`": [], "Diffusers' script": []}
            for number in range(arguments.rounds):
                output = Path(folder) / f"{case.base.name}-{case.batch}-{case.half}-{number}"
                found["`diffusekrona train`"].append(measure(ours(case, output / "ours")))
                found["Diffusers' script"].append(measure(peer(arguments.peers / case.script, case, output / "peer")))
            for method, peaks in found.items():
                medians = [statistics.median(getattr(one, name.name) for one in peaks) for name in fields(Peaks)]
                lines.append(f"| {case.name} | {method} | " + " | ".join(f"{value:.0f}" for value in medians) + " |")
                print(lines[-1], flush=True)
    RESULT.write_text(f"{__doc__}\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="examples/dreambooth, see above")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
