"""The LoRA that `examples/lora_to_krona.py` starts from: PEFT's, rank 16, on the pictures of examples/toy-bear.

    python -m recipes.lora.train

Trained on the repository's small base model as the demo trains its adapter, it takes about two minutes of two CPU
cores and writes `examples/toy-bear-lora/pytorch_lora_weights.safetensors`.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig

from diffusekrona.cli.progress import training_progress
from diffusekrona.training import ImagePlan, fit, load_folder
from research.demo.personalise import TARGETS, TRAINING, DemoPaths

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "examples" / "toy-bear-lora"


def main() -> None:
    """Train and save."""
    pipe = StableDiffusionXLPipeline.from_pretrained(ROOT / DemoPaths.base, dtype=torch.float32)
    torch.manual_seed(0)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, init_lora_weights="gaussian"))
    parameters = {name: parameter for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images = load_folder(ROOT / "examples" / "toy-bear", "a sks toy", ImagePlan(size))
    with training_progress(TRAINING.max_train_steps) as on_step:
        result = fit(pipe, images, parameters, TRAINING, on_step)
    for parameter in parameters.values():
        parameter.data = parameter.data.half()  # half the file, and more than enough digits
    pipe.unet.save_lora_adapter(OUTPUT)
    print(f"{result.parameters:,} parameters, loss {result.final_loss:.4f}, {OUTPUT.name} written")


if __name__ == "__main__":
    main()
