"""Pictures of one model in a row, small, in one file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

THUMBNAIL = 256
"""Longest side of a picture on a sheet, in pixels; smaller ones stay as they are."""


def sheet_of(images: Sequence[Image.Image]) -> bytes:
    """A JPEG of pictures of one size in a row."""
    small = [image.convert("RGB") for image in images]
    for image in small:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    width, height = small[0].size
    sheet = Image.new("RGB", (width * len(small), height))
    for number, image in enumerate(small):
        sheet.paste(image, (number * width, 0))
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=92, subsampling=0)
    return content.getvalue()


def pictures_on(path: Path, count: int) -> list[Image.Image]:
    """The pictures of a sheet of so many."""
    with Image.open(path) as sheet:
        width = sheet.width // count
        return [sheet.crop((number * width, 0, (number + 1) * width, sheet.height)) for number in range(count)]
