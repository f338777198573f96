"""Drawings with something wrong, to see what a score sees.

A drawing is premultiplied RGBA, (4, n, n) in [0, 1]. What is spoilt keeps its outline, unless it is blurred. A part is
left, top, right and bottom, as shares of the drawing's edge.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

Part = tuple[float, float, float, float]


def from_image(image: Image.Image) -> Tensor:
    """The drawing of an RGBA image."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGBA"), dtype=np.float32) / 255).permute(2, 0, 1)
    return torch.cat([pixels[:3] * pixels[3:], pixels[3:]])


def to_image(drawing: Tensor) -> Image.Image:
    """A drawing as an RGBA image."""
    alpha = drawing[3:]
    colours = torch.where(alpha > 0, drawing[:3] / alpha.clamp(min=1 / 255), 0).clamp(0, 1)
    levels = (torch.cat([colours, alpha]) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def resized(drawing: Tensor, edge: int) -> Tensor:
    """A drawing of another size."""
    return functional.interpolate(drawing[None], (edge, edge), mode="bilinear", antialias=True)[0].clamp(0, 1)


def on_colour(
    drawing: Tensor, edge: int, corner: tuple[int, int], colour: Sequence[float], side: int = 128
) -> Image.Image:
    """A picture of `side` pixels with the drawing on a colour in [0, 1]; `corner` is its left and top in pixels."""
    picture = torch.as_tensor(colour, dtype=torch.float32)[:, None, None].repeat(1, side, side)
    small, (left, top) = resized(drawing, edge), corner
    window = picture[:, top : top + edge, left : left + edge]
    window.mul_(1 - small[3:]).add_(small[:3])
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def erased(drawing: Tensor, parts: Sequence[Part]) -> Tensor:
    """A drawing whose parts have the colours of what is around them."""
    edge = drawing.shape[-1]
    known = torch.ones(1, edge, edge)
    for part in parts:
        left, top, right, bottom = _pixels(part, edge)
        known[:, top:bottom, left:right] = 0
    total, weight, half = drawing * known, 1.0, edge
    while half > 4:
        half //= 2
        weight /= 50
        small = functional.adaptive_avg_pool2d((drawing * known)[None], half)
        total = total + weight * functional.interpolate(small, (edge, edge), mode="bilinear")[0]
    colours = total[:3] / total[3:].clamp(min=1e-9)
    return torch.cat([torch.where(known > 0, drawing[:3], colours.clamp(0, 1) * drawing[3:]), drawing[3:]])


def moved(drawing: Tensor, parts: Sequence[Part], ways: Sequence[tuple[float, float]]) -> Tensor:
    """A drawing whose parts are elsewhere: each goes its way to the right and down, in shares of the edge."""
    edge = drawing.shape[-1]
    spoilt = erased(drawing, parts)
    moving = drawing[:3] - spoilt[:3]
    for part, way in zip(parts, ways, strict=True):
        left, top, right, bottom = _pixels(part, edge)
        across, down = (round(step * edge) for step in way)
        across, down = max(-left, min(across, edge - right)), max(-top, min(down, edge - bottom))
        there = spoilt[:, top + down : bottom + down, left + across : right + across]
        there[:3] = torch.minimum((there[:3] + moving[:, top:bottom, left:right]).clamp(min=0), there[3:])
    return spoilt


def blurred(drawing: Tensor, pixels: int) -> Tensor:
    """A drawing that was made as small as `pixels` by `pixels`, and large again; its outline is blurred, too."""
    return functional.interpolate(resized(drawing, pixels)[None], drawing.shape[-2:], mode="bilinear")[0].clamp(0, 1)


def blob(drawing: Tensor) -> Tensor:
    """The outline, filled with the drawing's mean colour."""
    mean = drawing[:3].sum((1, 2)) / drawing[3].sum()
    return torch.cat([mean[:, None, None] * drawing[3:], drawing[3:]])


def recoloured(drawing: Tensor, mixing: Tensor) -> Tensor:
    """A drawing with other colours: `mixing`, (3, 3), times red, green and blue."""
    colours = torch.einsum("ij,jhw->ihw", mixing, drawing[:3]).clamp(min=0)
    return torch.cat([torch.minimum(colours, drawing[3:]), drawing[3:]])


def _pixels(part: Part, edge: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(share * edge) for share in part)
    return left, top, right, bottom
