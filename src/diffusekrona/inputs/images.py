"""Image files: which a folder holds, and their pixels, upright and in RGB."""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from ..errors import DatasetError

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".heic", ".heif", ".hif", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".jp2", ".j2k", ".ppm", ".pgm", ".pnm", ".tga",
)  # fmt: skip
"""What files of pictures are called. Pillow reads those of HEIC by pillow-heif."""

NO_IMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises where it cannot read an image."""


class UnreadableImageError(DatasetError):
    """One image is damaged; others may do."""

    def __init__(self, source: object, reason: object) -> None:
        super().__init__(f"The image {source} cannot be read ({reason}). Save it again as PNG or JPEG, or take it out.")


def image_paths(folder: str | Path) -> list[Path]:
    """The images of a folder (not of its subfolders), in the order of their names.

    Raises:
        DatasetError: no such folder, or no image in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DatasetError(f"There is no image folder {folder} (looked for {folder.absolute()}).")
    paths = sorted(path for path in folder.iterdir() if is_image(path))
    if not paths:
        raise DatasetError(f"No images in {folder}, which needs at least one file such as name.png or name.jpg.")
    return paths


def is_image(path: Path) -> bool:
    """Whether a path is a file that is called like an image."""
    # macOS leaves "._name.jpg" files, which hold no image, on foreign disks.
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_image(path: Path) -> Image.Image:
    """The pixels as they are stored; of several pictures in a file, the first.

    Raises:
        UnreadableImageError: the file is damaged or no image.
    """
    heif = _heif() or path.suffix.lower() not in (".heic", ".heif", ".hif")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except NO_IMAGE as error:
        raise UnreadableImageError(path, error if heif else "HEIC needs: pip install pillow-heif") from error


@cache
def _heif() -> bool:
    """Let Pillow read HEIC if pillow-heif is installed; whether it is."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def upright_rgb(image: Image.Image, source: object = "in memory") -> Image.Image:
    """An image as a viewer shows it: turned as its EXIF entry says, on white where it is transparent, in RGB.

    Raises:
        UnreadableImageError: its pixels cannot be decoded; `source` says which it is.
    """
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except NO_IMAGE as error:
        raise UnreadableImageError(source, error) from error


def upright_alpha(image: Image.Image) -> Image.Image:
    """How opaque an image is, turned as `upright_rgb` turns it: grey, white where it is opaque."""
    return ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys to 255 instead of scaling them.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_png(image: Image.Image) -> bytes:
    """An image, without loss."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def figure_png(figure: Figure) -> bytes:
    """A figure, at 110 dots per inch. What the font cannot draw, such as Chinese in matplotlib's own, is a box."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
