"""Image sizes of about one area and various aspect ratios, of which each image takes the nearest."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""Width and height in pixels."""

WIDEST = 2.0
"""The longest side over the shortest."""


def sizes_around(resolution: int, multiple: int) -> list[Size]:
    """The sizes whose area is nearest to resolution² from below, from 1 : 2 to 2 : 1, in steps of 1/16 of a side.

    Args:
        resolution: side of the square among them in pixels, a multiple of `multiple`.
        multiple: of which all sides are multiples.
    """
    step = max(multiple, resolution // 16 // multiple * multiple)
    sizes = set()
    for width in range(step, int(resolution * math.sqrt(WIDEST)) + step, step):
        height = resolution * resolution // width // step * step
        if height and max(width, height) <= WIDEST * min(width, height):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes | {(resolution, resolution)})


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """Of some sizes, the one whose aspect ratio is nearest to that of another size; of equals the largest."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda one: (abs(math.log(one[0] / one[1]) - ratio), -one[0] * one[1]))
