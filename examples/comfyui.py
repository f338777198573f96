"""Write an adapter as a file that ComfyUI, Forge and kohya's scripts load as they load a LoRA.

    python examples/comfyui.py --base models/emoji-sdxl --adapter my-toy --output my-toy-lokr.safetensors

Put the file into ComfyUI's `models/loras` and choose it in a "Load LoRA" node; nothing needs to be installed there.
For SDXL and SD 1.x, `diffusekrona convert my-toy my-toy-lokr.safetensors --to lokr` does it without the base.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from diffusekrona import load_krona, save_krona

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", default="models/emoji-sdxl", help="a Diffusers pipeline: a folder or hub id")
parser.add_argument("--adapter", default="my-toy", help="what examples/train.py saved")
parser.add_argument("--output", default="my-toy-lokr.safetensors")
arguments = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(arguments.base, dtype=torch.float32)
load_krona(pipe, arguments.adapter)
print("wrote", save_krona(pipe, arguments.output, format="lokr"))
