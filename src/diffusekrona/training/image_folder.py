"""What a folder of training images holds: pictures, their masks, kohya's subfolders, and what is none of these."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from ..inputs.captions import CAPTION_SUFFIXES, TABLES
from ..inputs.images import is_image

_KOHYA = re.compile(r"(\d+)_(.+)")
_MASK = re.compile(r"(.+)(-masklabel|\.mask)")
_OF_THE_SYSTEM = ("Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class ImageFolder:
    """A folder, without its subfolders.

    Attributes:
        folder: its path.
        images: pictures in the order of their names.
        masks: of pictures, by the picture's path.
        others: what else is there, but for hidden files.
        repeats: how often each picture is used.
        prompt: what the folder's name says of its pictures, in kohya's layout.
    """

    folder: Path
    images: list[Path]
    masks: dict[Path, Path]
    others: list[str]
    repeats: int = 1
    prompt: str | None = None

    def passed_over(self, read: Collection[Path]) -> list[str]:
        """What is not used, where these files were read beside the pictures; each with a reason."""
        names = {path.name for path in read}
        return [f"{name} ({_reason(name)})" for name in self.others if name not in names]


def image_folders(folder: str | Path) -> list[ImageFolder]:
    """A folder of training images, and its subfolders that are called like `10_sks toy`, if they hold any.

    Raises:
        DatasetError: there is no such folder, or no image in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DatasetError(f"There is no image folder {folder} (looked for {folder.absolute()}).")
    top, found = _one(folder), []
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        told = _KOHYA.fullmatch(path.name)
        inside = _one(path, int(told[1]), told[2]) if told else _one(path)
        if told and inside.images and inside.repeats:
            found.append(inside)
        elif inside.images:
            top.others.append(f"{path.name}/")
    if top.images or found:
        return [top, *found]
    folders = [name for name in top.others if name.endswith("/")]
    beside = f"; its subfolders {', '.join(folders)} are not looked into" if folders else ""
    raise DatasetError(f"No images in {folder}, which needs at least one file such as name.png or name.jpg{beside}.")


def _one(folder: Path, repeats: int = 1, prompt: str | None = None) -> ImageFolder:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = [path for path in files if is_image(path)]
    stems = {path.stem: path for path in pictures}
    told = [(path, _MASK.fullmatch(path.stem)) for path in pictures]
    masks = {stems[name[1]]: path for path, name in told if name is not None and name[1] in stems}
    images = [path for path in pictures if path not in masks.values()]
    others = [path.name for path in files if path not in pictures and path.name not in _OF_THE_SYSTEM]
    return ImageFolder(folder, images, masks, others, repeats, prompt)


def _reason(name: str) -> str:
    if name.endswith("/"):
        return "a subfolder; those that are used are called like 10_sks toy"
    if name in TABLES or Path(name).suffix.lower() in CAPTION_SUFFIXES:
        return "a caption without an image"
    return "no image"
