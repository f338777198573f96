"""Class images, which the base draws of the subject's class before it learns, so that it goes on drawing others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..generation import generate_images
from ..inputs.images import image_png, is_image
from ..storage import write_whole
from .checkpoints import base_identity

_DRAWN = re.compile(r"class-([0-9a-f]{8})-(\d{5})\.png")


def draw_class_images(
    pipe: Any,
    prompt: str,
    folder: Path,
    count: int,
    *,
    batch_size: int = 4,
    seed: int = 0,
    device: torch.device | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Let a pipeline draw class images until a folder holds so many (prior preservation, Ruiz et al. 2023).

    Images of the user count first. Those that were drawn before, also by a run that was stopped, count if they are of
    the same base, prompt and seed, which is what the names of their files are made of; others are left alone.

    Args:
        pipe: any text-to-image pipeline, without adapters.
        prompt: of all images, such as "a toy".
        folder: made if missing.
        count: how many images to have.
        batch_size: images per pass.
        seed: of the first image; the next ones count up.
        device: where to draw; by default where the pipeline is.
        on_image: called before the first pass and after each with how many there are and how many there will be.

    Returns:
        the names of the files to use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(repr((base_identity(pipe), prompt, seed)).encode()).hexdigest()[:8]
    there = sorted(path.name for path in folder.iterdir() if is_image(path))
    own = [name for name in there if _DRAWN.fullmatch(name) is None][:count]
    wanted = [f"class-{mark}-{number:05d}.png" for number in range(count - len(own))]
    missing = [name for name in wanted if name not in there]
    present = len(own) + len(wanted) - len(missing)
    if missing and device is not None:
        pipe.to(device)
    if missing and on_image is not None:
        on_image(present, count)
    for start in range(0, len(missing), batch_size):
        names = missing[start : start + batch_size]
        seeds = [seed + int(name[-9:-4]) for name in names]
        images = generate_images(pipe, [prompt] * len(names), seeds, batch_size=batch_size)
        write_whole({folder / name: image_png(image) for name, image in zip(names, images, strict=True)})
        if on_image is not None:
            on_image(present + start + len(names), count)
    return own + wanted
