"""Class images, which the base draws of the subject's class before it learns, so that it goes on drawing others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..generation import generate_images
from ..images import image_png, is_image
from ..storage import write_whole


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
) -> int:
    """Let a pipeline draw class images until a folder holds so many (prior preservation, Ruiz et al. 2023).

    Images that are there already count, so those of an earlier run, also of one that was stopped, are used again.

    Args:
        pipe: any text-to-image pipeline, without adapters.
        prompt: of all images, such as "a toy".
        folder: made if missing.
        count: how many images it shall hold.
        batch_size: images per pass.
        seed: of the first image; the next ones count up.
        device: where to draw; by default where the pipeline is.
        on_image: called before the first pass and after each with how many there are and how many there will be.

    Returns:
        How many were drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = sum(is_image(path) for path in folder.iterdir())
    missing = [
        f"class-{number:05d}.png" for number in range(count) if not (folder / f"class-{number:05d}.png").exists()
    ]
    wanted = missing[: max(0, count - present)]
    if wanted and device is not None:
        pipe.to(device)
    if wanted and on_image is not None:
        on_image(present, count)
    for start in range(0, len(wanted), batch_size):
        names = wanted[start : start + batch_size]
        seeds = [seed + int(name[6:11]) for name in names]
        images = generate_images(pipe, [prompt] * len(names), seeds, batch_size=batch_size)
        write_whole({folder / name: image_png(image) for name, image in zip(names, images, strict=True)})
        if on_image is not None:
            on_image(present + start + len(names), count)
    return len(wanted)
