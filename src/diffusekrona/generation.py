"""Prompts to images, so that an image depends on its prompt and seed and not on what else was asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image

from .errors import KronAError


def generate_images(
    pipe: Any,
    prompts: Sequence[str],
    seed: int | Sequence[int] = 0,
    *,
    guidance_scale: float = 7.5,
    steps: int = 50,
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Generate one image per prompt.

    Each image has a random generator of its own, on the CPU, so the same prompt and seed give the same image,
    up to rounding, in any batch, at any place in it and on any device. The defaults are within what Appendix
    D.6 found best: guidance from 7 to 10 and about 50 steps.

    Args:
        pipe: a text-to-image pipeline, with or without adapters, or one of videos, of which one frame is drawn.
        prompts: one per image.
        seed: of every image, or one per image.
        guidance_scale: how closely to follow the prompt; 1 or less turns guidance off.
        steps: denoising steps.
        batch_size: images per pass.
        height: of the images in pixels, given together with the width; None takes the pipeline's own.
        width: of the images in pixels.
        negative_prompt: what the images should not show.
        on_step: called after each denoising step with the steps done and all steps, over all batches.

    Returns:
        the images in the order of the prompts.

    Raises:
        KronAError: a number is out of range, or there are not as many seeds as prompts.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = _seeds(seed, len(prompts))
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise KronAError(f"{name} must be at least 1, not {value}.")
    if (height is None) != (width is None):
        # Stable Diffusion's pipeline would ignore the one that is given.
        raise KronAError("Give both height and width, or neither.")
    unwanted = {} if negative_prompt is None else {"negative_prompt": negative_prompt}  # some have no such thing
    films = "num_frames" in inspect.signature(pipe).parameters
    frame = {"num_frames": 1, "output_type": "pil"} if films else {}
    starts = range(0, len(prompts), batch_size)
    images: list[Image.Image] = []
    for batch, start in enumerate(starts):
        chosen = slice(start, start + batch_size)
        made = pipe(
            prompt=prompts[chosen],
            **{name: [value] * len(prompts[chosen]) for name, value in unwanted.items()},
            generator=[torch.Generator().manual_seed(s) for s in seeds[chosen]],
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            height=height,
            width=width,
            callback_on_step_end=_reporter(on_step, batch * steps, len(starts) * steps, steps),
            **frame,
        )
        images += [video[0] for video in made.frames] if frame else made.images
    return images


def _seeds(seed: int | Iterable[int], count: int) -> list[int]:
    seeds = [seed] * count if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise KronAError(f"There are {count} prompts but {len(seeds)} seeds; give one seed, or one for each prompt.")
    for value in seeds:
        if not 0 <= value < 2**64:
            raise KronAError(f"A seed must be from 0 to 2**64 - 1, not {value}.")
    return seeds


def _reporter(
    on_step: Callable[[int, int], None] | None, before: int, total: int, steps: int
) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None:
    """A Diffusers callback that tells `on_step` how far all batches together are."""
    if on_step is None:
        return None

    def report(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # Second-order schedulers call back more often than `steps`.
        on_step(before + min(step + 1, steps), total)
        return {}

    return report
