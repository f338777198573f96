"""Pictures of noise: no two look alike to an encoder with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A coarse RGB noise of width × height pixels."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size)


def save(folder: Path, **seeds: int) -> Path:
    """PNG files of noise, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in seeds.items():
        noise(seed).save(folder / f"{name}.png")
    return folder
