"""Pictures: drawings of the bank, resized and pasted on flat colours.

A picture is RGB, 128 x 128, channels first; here in [0, 1], and in [-1, 1] where networks see it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from research.judges.scenes import COLOURS as COLOURS

from . import art
from .art import PIXELS


def resized(number: int, edge: int) -> Tensor:
    """A drawing of the bank, premultiplied, (4, edge, edge) in [0, 1]."""
    drawing = art.bank()[number][None].float() / 255
    return F.interpolate(drawing, size=(edge, edge), mode="bilinear", antialias=True)[0].clamp(0, 1)


def flat(colour: Sequence[float]) -> Tensor:
    """A picture of one colour, given in [0, 1]."""
    return torch.as_tensor(colour, dtype=torch.float32)[:, None, None].repeat(1, PIXELS, PIXELS)


def named(name: str, rng: np.random.Generator, jitter: float = 6.0) -> list[float]:
    """A named colour in [0, 1], each channel moved by up to `jitter` levels of 255."""
    levels = np.asarray(COLOURS[name], np.float32) + rng.uniform(-jitter, jitter, 3)
    return [float(level) for level in np.clip(levels / 255, 0, 1)]


def paste(picture: Tensor, drawing: Tensor, top: int, left: int) -> None:
    """Lay a premultiplied drawing over a picture, in place."""
    edge = drawing.shape[-1]
    window = picture[:, top : top + edge, left : left + edge]
    window.mul_(1 - drawing[3:]).add_(drawing[:3])


def to_network(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures as one batch (n, 3, 128, 128) in [-1, 1]."""
    return (torch.stack(list(pictures)) * 2 - 1).contiguous(memory_format=torch.channels_last)


def to_image(picture: Tensor) -> Image.Image:
    """A picture in [0, 1] as an 8-bit image."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def sheet(rows: Sequence[Tensor], path: Path) -> None:
    """Save rows of pictures, each (n, 3, height, width) in [-1, 1], as one image."""
    lines = [torch.cat(list(row.float().cpu()), dim=-1) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    to_image(torch.cat(lines, dim=-2) / 2 + 0.5).save(path)
