"""Images and figures as PNG files' content."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_png(image: Image.Image) -> bytes:
    """An image, without loss."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def figure_png(figure: Figure) -> bytes:
    """A figure, at 110 dots per inch."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
