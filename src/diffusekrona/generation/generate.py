"""Prompts to images, so that an image depends on its prompt and seed and not on what else was asked for."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..errors import KronAError
from .prompts import chunks_needed, encode_in_chunks

DEFAULT_GUIDANCE = 7.5
"""Of Stable Diffusion 1.x, 2.x and SDXL: within what Appendix D.6 found best, 7 to 10."""


def generate_images(
    pipe: Any, prompts: Sequence[str], seed: int | Sequence[int] = 0, **options: Any
) -> list[Image.Image]:
    """Generate one image per prompt, all before any is given back; `generated` has the options and the errors."""
    return list(generated(pipe, prompts, seed, **options))


def generated(
    pipe: Any,
    prompts: Sequence[str],
    seed: int | Sequence[int] = 0,
    *,
    guidance_scale: float | None = None,
    steps: int | None = 50,
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Image.Image]:
    """Generate one image per prompt, each batch when it is asked for.

    Each image has a random generator of its own, on the CPU, so the same prompt and seed give the same image,
    up to rounding, in any batch, at any place in it and on any device. About 50 steps are what Appendix D.6 found
    best. Prompts longer than CLIP's 77 tokens are encoded in chunks for Stable Diffusion 1.x, 2.x and SDXL; of one
    batch, all have as many chunks as the longest.

    An autoencoder in half precision that gives something else than finite numbers is run again in float32, with a
    warning.

    Args:
        pipe: a text-to-image pipeline, with or without adapters, or one of videos, of which one frame is drawn.
        prompts: one per image.
        seed: of every image, or one per image.
        guidance_scale: how closely to follow the prompt; 1 or less turns guidance off. None is 7.5 for Stable
            Diffusion 1.x, 2.x and SDXL, and the pipeline's own for others.
        steps: denoising steps; None is the pipeline's own number.
        batch_size: images per pass.
        height: of the images in pixels, given together with the width; None takes the pipeline's own.
        width: of the images in pixels.
        negative_prompt: what the images should not show.
        on_step: called after each denoising step with the steps done and all steps, over all batches; for pipelines
            that cannot say so, after each batch.

    Yields:
        the images in the order of the prompts.

    Raises:
        KronAError: a number is out of range, there are not as many seeds as prompts, or the pipeline takes no
            negative prompt.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = _seeds(seed, len(prompts))
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise KronAError(f"{name} must be at least 1, not {value}.")
    if (height is None) != (width is None):
        # Stable Diffusion's pipeline would ignore the one that is given.
        raise KronAError("Give both height and width, or neither.")
    taken = inspect.signature(pipe.__call__).parameters
    if negative_prompt is not None and "negative_prompt" not in taken:
        raise KronAError(f"{type(pipe).__name__} takes no negative prompt; leave it out.")
    options = _guidance(pipe, guidance_scale, negative_prompt)
    if height is not None:
        options |= {"height": height, "width": width}
    if "num_frames" in taken:
        options |= {"num_frames": 1, "output_type": "pil"}
    if steps is not None:
        options["num_inference_steps"] = steps
    return _batches(pipe, prompts, seeds, batch_size, options, on_step)


def _batches(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    batch_size: int,
    options: dict[str, Any],
    on_step: Callable[[int, int], None] | None,
) -> Iterator[Image.Image]:
    starts = range(0, len(prompts), batch_size)
    steps = int(options.get("num_inference_steps", 1))
    can_say = "callback_on_step_end" in inspect.signature(pipe.__call__).parameters
    for batch, start in enumerate(starts):
        chosen = slice(start, start + batch_size)
        told = _reporter(on_step, batch * steps, len(starts) * steps, steps)
        with _finite_pictures(pipe):
            made = pipe(
                **_text(pipe, prompts[chosen], options),
                generator=[torch.Generator().manual_seed(s) for s in seeds[chosen]],
                **({"callback_on_step_end": told} if can_say and told is not None else {}),
            )
        if on_step is not None and not (can_say and "num_inference_steps" in options):
            on_step((batch + 1) * steps, len(starts) * steps)
        yield from made.images if hasattr(made, "images") else (video[0] for video in made.frames)


def _guidance(pipe: Any, scale: float | None, negative_prompt: str | None) -> dict[str, Any]:
    """How a pipeline is told of guidance; some have a number of their own for guidance by a negative prompt."""
    told: dict[str, Any] = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
    if scale is None:
        return told | ({"guidance_scale": DEFAULT_GUIDANCE} if hasattr(pipe, "unet") else {})
    denoiser = getattr(pipe, "transformer", None)
    distilled = denoiser is not None and denoiser.config.get("guidance_embeds", False)
    if "true_cfg_scale" in inspect.signature(pipe.__call__).parameters and not distilled:
        # Without a negative prompt it would be without effect.
        return {"negative_prompt": " ", **told, "true_cfg_scale": scale}
    return told | {"guidance_scale": scale}


def _text(pipe: Any, prompts: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The prompts of a batch and all options; where some do not fit into CLIP's 77 tokens, they are encoded here."""
    negative = options.get("negative_prompt")
    told = {**options, "prompt": prompts}
    if negative is not None:
        told["negative_prompt"] = [negative] * len(prompts)
    if not hasattr(pipe, "unet") or getattr(pipe, "tokenizer", None) is None:
        return told
    chunks = chunks_needed(pipe, [*prompts, negative or ""])
    if chunks == 1:
        return told
    device = pipe._execution_device
    with torch.no_grad():
        for name, texts in (("", prompts), ("negative_", [negative or ""] * len(prompts))):
            said = encode_in_chunks(pipe, texts, chunks, device)
            told.pop(f"{name}prompt", None)
            told[f"{name}prompt_embeds"] = said.hidden
            if said.pooled is not None:
                told[f"{name}pooled_prompt_embeds"] = said.pooled
    return told


@contextmanager
def _finite_pictures(pipe: Any) -> Iterator[None]:
    """Run a half-precision autoencoder again in float32 where it gives numbers that are not finite."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        yield
        return
    decode = vae.decode

    def checked(latents: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        found = decode(latents, *arguments, **named)
        if bool(torch.isfinite(found[0]).all()):
            return found
        before = vae.dtype
        if before == torch.float32 or not bool(torch.isfinite(latents).all()):
            warnings.warn(
                "A picture holds numbers that are not finite, so it is black in parts. "
                "Load the base in bfloat16 or float32: dtype.",
                UserWarning,
                stacklevel=2,
            )
            return found
        warnings.warn(
            f"The autoencoder gave numbers that are not finite in {str(before).removeprefix('torch.')}, as SDXL's "
            "does; it was run again in float32.",
            UserWarning,
            stacklevel=2,
        )
        nn.Module.to(vae, dtype=torch.float32)
        try:
            return decode(latents.float(), *arguments, **named)
        finally:
            nn.Module.to(vae, dtype=before)

    vae.decode = checked
    try:
        yield
    finally:
        del vae.decode


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
