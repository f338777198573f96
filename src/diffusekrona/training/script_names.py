"""Names of settings in Diffusers' DreamBooth scripts: those that mean one of ours, and what to use for others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import TrainingConfigError


def _resume(value: Any) -> dict[str, Any]:
    if value != "latest":
        raise TrainingConfigError(
            f"resume_from_checkpoint is 'latest', or left out, not {value!r}, as a run goes on from its newest "
            "checkpoint. To begin with another run's adapter, give init_from."
        )
    return {"resume": True}


MEANT: Mapping[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "resume_from_checkpoint": (str, _resume),
    "use_8bit_adam": (bool, lambda value: {"optimizer": "adamw8bit"} if value else {}),
}
"""Name → the type of its value, and which settings of ours it means."""

_RANK = (
    "A Kronecker adapter has no rank: a1 and a2 set its size (4 and 64 by default; `diffusekrona params` counts), "
    "and it needs no alpha of its own."
)
_LATENTS = "Images are encoded once, before the first step, so nothing has to be loaded beside it; leave it out."
_OF_TORCH = "PyTorch's own attention is used; leave it out."

ANSWERS: Mapping[str, str] = {
    "rank": _RANK,
    "lora_alpha": _RANK,
    "lora_dropout": "It is dropout here.",
    "lora_layers": "It is target_modules here, a word or a regular expression of names.",
    "use_dora": "DoRA is LoRA's; leave it out.",
    "output_kohya_format": "For ComfyUI and kohya's scripts, use also: lokr.",
    "scale_lr": "The learning rate is used as it is given; leave it out.",
    "validation_epochs": "Pictures are drawn every validation_steps steps.",
    "num_validation_images": "Give validation_prompt as often as you want pictures.",
    "final_validation_prompt": "The validation_prompt is drawn after the last step, too.",
    "prior_generation_precision": "Class images are drawn in the type of the base, dtype; leave it out.",
    "enable_xformers_memory_efficient_attention": _OF_TORCH,
    "enable_npu_flash_attention": _OF_TORCH,
    "allow_tf32": "Set torch.backends.cuda.matmul.allow_tf32 in a script of yours; leave it out.",
    "dataloader_num_workers": _LATENTS,
    "cache_latents": f'That is cache: "memory", the default. {_LATENTS}',
    "vae_encode_mode": "Latents are drawn from the autoencoder's distribution; leave it out.",
    "local_rank": "accelerate launch says it by itself; leave it out.",
    "logging_dir": "TensorBoard's files are in the run's folder; leave it out.",
    "hub_token": "Log in with `hf auth login`; leave it out.",
    "do_edm_style_training": "EDM's training is not supported; use a base with β values or a flow.",
    "prodigy_beta3": "Give it in optimizer_args, as beta3.",
    "prodigy_decouple": "Give it in optimizer_args, as decouple.",
    "prodigy_use_bias_correction": "Give it in optimizer_args, as use_bias_correction.",
    "prodigy_safeguard_warmup": "Give it in optimizer_args, as safeguard_warmup.",
    "weighting_scheme": "It is timestep_sampling and loss_weighting here.",
    "max_sequence_length": "Each family reads as much of a prompt as its pipeline; leave it out.",
    "tokenizer_name": "The base brings its tokenizer; leave it out.",
    "image_interpolation_mode": "Images are resized by Lanczos' filter; leave it out.",
    "bnb_quantization_config_path": "It is quantize here.",
}
"""Name → what to do instead."""


def translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with Diffusers' names as ours.

    Raises:
        TrainingConfigError: a name's value has no meaning here, or another setting contradicts it.
    """
    found = {name: value for name, value in values.items() if name not in MEANT}
    for name, (_, meaning) in MEANT.items():
        if values.get(name) is None:
            continue
        for ours, value in meaning(values[name]).items():
            if found.get(ours, value) != value:
                raise TrainingConfigError(
                    f"{name} means {ours}: {value}, but {ours} is {found[ours]}. Give one of them."
                )
            found[ours] = value
    return found


def answer(name: str) -> str:
    """What to do instead of a name of Diffusers' scripts, with a space before it; nothing for others."""
    found = ANSWERS.get(name.lstrip("-").replace("-", "_"))
    return f" {found}" if found else ""
