"""A plain Diffusers training loop, with three lines of diffusekrona in it.

    python examples/train.py --base models/emoji-sdxl --images examples/toy-bear --output my-toy

Everything else is what such a script holds anyway: encode pictures and prompts, noise the latents, predict, step.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffusekrona import KronAConfig, inject_krona, save_krona  # 1 of 3

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", default="models/emoji-sdxl", help="a Stable Diffusion XL pipeline: a folder or hub id")
parser.add_argument("--images", type=Path, default=Path("examples/toy-bear"), help="a folder of PNGs of one subject")
parser.add_argument("--prompt", default="a sks toy", help="what the subject is called")
parser.add_argument("--output", default="my-toy", help="where the adapter goes")
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--learning-rate", type=float, default=3e-3)
arguments = parser.parse_args()

torch.manual_seed(0)
pipe = StableDiffusionXLPipeline.from_pretrained(arguments.base, dtype=torch.float32)
krona = inject_krona(pipe, KronAConfig(a1=2, a2=4))  # 2 of 3

pictures = [Image.open(path).convert("RGB") for path in sorted(arguments.images.glob("*.png"))]
with torch.no_grad():
    pixels = VaeImageProcessor().preprocess(pictures)
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    hidden, _, pooled, _ = pipe.encode_prompt(arguments.prompt, do_classifier_free_guidance=False)
count, height, width = len(pictures), pixels.shape[-2], pixels.shape[-1]
conditions = {
    "encoder_hidden_states": hidden.expand(count, -1, -1),
    "added_cond_kwargs": {
        "text_embeds": pooled.expand(count, -1),
        "time_ids": torch.tensor([[height, width, 0, 0, height, width]] * count),
    },
}

noiser = DDPMScheduler.from_config(pipe.scheduler.config)
optimizer = torch.optim.AdamW(krona.parameters(), lr=arguments.learning_rate)
for step in range(1, arguments.steps + 1):
    noise = torch.randn_like(latents)
    timesteps = torch.randint(noiser.config.num_train_timesteps, (count,))
    predicted = pipe.unet(noiser.add_noise(latents, noise, timesteps), timesteps, **conditions).sample
    if noiser.config.prediction_type == "v_prediction":
        wanted = noiser.get_velocity(latents, noise, timesteps)
    else:
        wanted = noise
    loss = torch.nn.functional.mse_loss(predicted, wanted)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == arguments.steps:
        print(f"step {step}: loss {loss.item():.4f}")

print("saved to", save_krona(pipe, arguments.output))  # 3 of 3
