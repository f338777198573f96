"""A plain Diffusers script that generates, with two calls of diffusekrona in it.

python examples/generate.py --base models/emoji-sdxl --adapter my-toy "a sks toy on a red background"
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from diffusekrona import load_krona, merge_krona

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("--base", default="models/emoji-sdxl", help="a Diffusers pipeline: a folder or hub id")
parser.add_argument("--adapter", default="my-toy", help="what examples/train.py saved")
parser.add_argument("--output", default="picture.png")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--guidance-scale", type=float, default=2.0)
arguments = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(arguments.base, dtype=torch.float32)
load_krona(pipe, arguments.adapter)
merge_krona(pipe)  # now it generates at the price of the base alone

generator = torch.Generator().manual_seed(0)
options = {"guidance_scale": arguments.guidance_scale, "num_inference_steps": arguments.steps}
picture = pipe(arguments.prompt, **options, generator=generator).images[0]
picture.save(arguments.output)
print("wrote", arguments.output)
