"""Turn a LoRA into Kronecker adapters of a half, a fifth and a tenth of its size, and look at what is lost.

    python examples/lora_to_krona.py --lora examples/toy-bear-lora --output lora-to-krona

Each adapter holds the nearest Kronecker products to the LoRA's updates; the relative error is printed, and a sheet of
pictures shows LoRA and adapters side by side, from the same prompts and seeds.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import DiffusionPipeline

from diffusekrona import load_krona, merge_file, unload_krona
from diffusekrona.files.convert import Target, convert
from diffusekrona.files.inspect import inspect_file
from diffusekrona.generation import generate_images

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", default="models/emoji-sdxl", help="a Diffusers pipeline's folder")
parser.add_argument("--lora", type=Path, default=Path("examples/toy-bear-lora"), help="a LoRA's file or folder")
parser.add_argument("--output", type=Path, default=Path("lora-to-krona"), help="a folder for adapters and sheet")
parser.add_argument("--prompt", default="a sks toy on a {} background", help="with {} for the background")
parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.2, 0.1], help="of the LoRA's parameters")
parser.add_argument("--terms", type=int, help="Kronecker products to sum; as many as come nearest if left out")
parser.add_argument("--steps", type=int, default=30)
arguments = parser.parse_args()

prompts = [arguments.prompt.format(background) for background in ("orange", "purple", "pink", "brown")]
options = {"guidance_scale": 1.5, "steps": arguments.steps, "batch_size": len(prompts)}
pipe = DiffusionPipeline.from_pretrained(arguments.base, dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
arguments.output.mkdir(parents=True, exist_ok=True)

rows = {}
for share in arguments.shares:
    path = arguments.output / f"krona-{share:g}"
    done = convert(arguments.lora, path, model=arguments.base, target=Target(budget=share, num_terms=arguments.terms))
    print(f"{path}: {done.parameters:,} parameters, relative error {done.total_error:.3f}")
    load_krona(pipe, path)
    rows[f"KronA, {done.parameters:,}\nerror {done.total_error:.2f}"] = generate_images(
        pipe, prompts, range(len(prompts)), **options
    )
    unload_krona(pipe)
merge_file(pipe, arguments.lora)  # last, since this one stays
lora = inspect_file(arguments.lora)
rows = {f"LoRA, {lora.parameters:,}": generate_images(pipe, prompts, range(len(prompts)), **options), **rows}

figure, axes = plt.subplots(len(rows), len(prompts), figsize=(1.6 * len(prompts) + 1.2, 1.6 * len(rows)), squeeze=False)
for (label, pictures), line in zip(rows.items(), axes, strict=True):
    line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for axis, picture in zip(line, pictures, strict=True):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
figure.tight_layout()
figure.savefig(arguments.output / "sheet.png", dpi=120)
print("wrote", arguments.output / "sheet.png")
