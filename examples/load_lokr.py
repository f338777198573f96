"""Generate with a LoKr file, of LyCORIS, kohya's scripts or PEFT, in a Stable Diffusion XL pipeline of Diffusers.

python examples/load_lokr.py --lokr some-lokr.safetensors "a sks toy on a red background"
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from diffusekrona import load_krona, merge_file
from diffusekrona.errors import AdapterFileError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("--base", default="models/emoji-sdxl", help="a Diffusers pipeline: a folder or hub id")
parser.add_argument("--lokr", default="my-toy-lokr.safetensors", help="a file or folder, or a hub id")
parser.add_argument("--output", default="picture.png")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--guidance-scale", type=float, default=2.0)
arguments = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(arguments.base, dtype=torch.float32)
try:
    load_krona(pipe, arguments.lokr)  # stays an adapter: to weigh, switch off or train on
except AdapterFileError as error:
    print(f"{error}\nMerging it instead.")
    merge_file(pipe, arguments.lokr)  # for good: LoHa, LoRA and DoRA, too

generator = torch.Generator().manual_seed(0)
options = {"guidance_scale": arguments.guidance_scale, "num_inference_steps": arguments.steps}
picture = pipe(arguments.prompt, **options, generator=generator).images[0]
picture.save(arguments.output)
print("wrote", arguments.output)
