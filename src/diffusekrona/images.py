"""Image files: which a folder holds, their pixels, upright and in RGB, and their captions in files beside them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from .errors import DatasetError
from .storage import write_whole

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

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
        raise DatasetError(f"No images in {folder}: it needs at least one {', '.join(IMAGE_SUFFIXES)} file.")
    return paths


def is_image(path: Path) -> bool:
    """Whether a path is a file that is called like an image."""
    # macOS leaves "._name.jpg" files, which hold no image, on foreign disks.
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_image(path: Path) -> Image.Image:
    """The pixels as they are stored.

    Raises:
        UnreadableImageError: the file is damaged or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except NO_IMAGE as error:
        raise UnreadableImageError(path, error) from error


def upright_rgb(image: Image.Image, source: object = "in memory") -> Image.Image:
    """An image as a viewer shows it: turned as its EXIF entry says, on white where it is transparent, in RGB.

    Raises:
        UnreadableImageError: its pixels cannot be decoded; `source` says which it is.
    """
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except NO_IMAGE as error:
        raise UnreadableImageError(source, error) from error


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
    """A figure, at 110 dots per inch."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


METADATA = "metadata.jsonl"
"""The table of a folder in the Hugging Face imagefolder layout: one JSON object per line."""

_TABLES = (METADATA, "prompts.json", "prompts.txt")


def read_caption(image_path: Path) -> str | None:
    """The text file beside an image, `dog.txt` beside `dog.png`, on one line; None without one.

    Raises:
        DatasetError: it is empty or not UTF-8.
    """
    path = image_path.with_suffix(".txt")
    if not path.is_file():
        return None
    caption = " ".join(_text(path, "caption").split())
    if not caption:
        raise DatasetError(
            f"The caption {path} is empty. "
            f"Write the prompt of {image_path.name} in it, or delete it to use the common one."
        )
    return caption


def read_prompts(folder: str | Path) -> dict[str, str]:
    """The prompt of every image of a folder, by file name.

    An image's own text file wins, `dog.txt` beside `dog.png`. The others' prompts are in the first of these that is
    there: `metadata.jsonl`, whose lines have `file_name` and `text`; `prompts.json`, an object from file name to
    prompt; `prompts.txt`, a line for each image in the order of their names.

    Raises:
        DatasetError: no folder, no image, or an image without a prompt, which is named; or a broken table.
    """
    paths = image_paths(folder)
    found = _table(paths[0].parent, [path.name for path in paths])
    prompts = {path.name: read_caption(path) or found.get(path.name, "").strip() for path in paths}
    missing = [name for name, prompt in prompts.items() if not prompt]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(paths)} images in {paths[0].parent} have no prompt: {_listed(missing)}. "
            f"Write {Path(missing[0]).with_suffix('.txt').name}, or a line of {METADATA} such as "
            + json.dumps({"file_name": missing[0], "text": "a dog on the moon"})
            + "."
        )
    return prompts


def write_metadata(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put entries, by file name, into a folder's `metadata.jsonl`, beside those of other images that are still there.

    Raises:
        DatasetError: there is a table, but a broken one.
    """
    path = folder / METADATA
    earlier = _metadata(path) if path.is_file() else {}
    rows = {name: row for name, row in earlier.items() if (folder / name).is_file()}
    rows |= {name: {"file_name": name, **entry} for name, entry in entries.items()}
    lines = [json.dumps(rows[name], ensure_ascii=False) for name in sorted(rows)]
    write_whole({path: ("\n".join(lines) + "\n").encode()})


def _table(folder: Path, names: list[str]) -> dict[str, str]:
    """Prompts by file name out of the first table that is there."""
    path = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    if path is None:
        return {}
    if path.name == METADATA:
        return {name: _prompt(path, name, row.get("text", "")) for name, row in _metadata(path).items()}
    if path.suffix == ".json":
        return {name: _prompt(path, name, prompt) for name, prompt in _parsed(path, _text(path), "").items()}
    lines = [line for line in _text(path).splitlines() if line.strip()]
    if len(lines) != len(names):
        raise DatasetError(
            f"{path} has {len(lines)} prompts for {len(names)} images; it needs a line for each image, "
            "in the order of their names."
        )
    return dict(zip(names, lines, strict=True))


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        row = _parsed(path, line, f", line {number},")
        name = row.get("file_name")
        if not isinstance(name, str):
            raise DatasetError(f'{path}, line {number}, has no "file_name"; each line needs "file_name" and "text".')
        rows[name] = row
    return rows


def _parsed(path: Path, text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{path}{where} is not JSON: {error}. Mend it, or take it away.") from error
    if not isinstance(value, dict):
        raise DatasetError(f"{path}{where} must be a JSON object, not {text[:40]!r}.")
    return value


def _prompt(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"The prompt of {name} in {path} must be a text, not {value!r}.")
    return value


def _text(path: Path, what: str = "table") -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"The {what} {path} is not UTF-8 text. Save it as UTF-8.") from error


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
