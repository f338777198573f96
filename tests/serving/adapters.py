"""Adapters of the tiny SDXL pipeline in a folder, for tests of what serves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusekrona import KronAConfig, inject_krona, save_krona, unload_krona
from tests.pipelines import tiny_sdxl_pipeline


def save(pipe: Any, path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Save an adapter with random factors; the pipeline is as before."""
    more = {"text_encoders": config.pop("text_encoders", False)}
    torch.manual_seed(seed)
    adapter = inject_krona(pipe, KronAConfig(init_weights=False, **config), "saved", **more)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(dtype)
    save_krona(pipe, path, "saved")
    unload_krona(pipe, "saved")
    return path


def folder_of(folder: Path, *names: str, **config: Any) -> Path:
    """A folder of adapters of the same shapes, each with its own factors."""
    pipe = tiny_sdxl_pipeline()
    for seed, name in enumerate(names):
        save(pipe, folder / f"{name}.safetensors", seed, **({"a1": 4, "a2": 8} | config))
    return folder


def draw(pipe: Any, prompts: list[str], seeds: list[int], **more: Any) -> Tensor:
    """Latents, one for each prompt, after two steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "generator": generators, **more}
    result: Tensor = pipe(prompts, **given).images
    return result
