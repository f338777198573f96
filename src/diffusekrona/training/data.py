"""Training images: found, turned upright, made RGB, cropped and resized to one size or to buckets, with prompts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from pydantic import Field

from ..errors import DatasetError
from ..images import NO_IMAGE, UnreadableImageError, image_paths, read_caption, read_image, upright_rgb
from .config import ImageSettings
from .randomness import generator_for

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


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingImage:
    """One image, ready for the autoencoder, and what the text side has to know about it.

    Attributes:
        image: RGB.
        prompt: what the image shows.
        original_size: (height, width) in pixels before any cropping or resizing, which SDXL conditions on.
        crop_top_left: (top, left) of the crop in pixels of the resized image, which SDXL conditions on.
        source: the file it comes from, for messages.
    """

    image: Image.Image
    prompt: str
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    source: str = "an image"

    @property
    def sizes(self) -> tuple[int, ...]:
        """What SDXL conditions on: original height and width, crop top and left, target height and width."""
        return (*self.original_size, *self.crop_top_left, self.image.height, self.image.width)


class ImagePlan(ImageSettings):
    """What becomes of each image, where the side of the results is known.

    Raises:
        TrainingConfigError: a value that no image could be made by.
    """

    resolution: int = Field(ge=1)
    """Side of the square results in pixels; with buckets, the root of their area."""
    multiple: int = Field(default=8, ge=1)
    """Number that the sides of all results are multiples of, in pixels."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random parts that are cut out."""

    def __init__(self, resolution: int, **values: Any) -> None:
        super().__init__(resolution=resolution, **values)

    @property
    def sizes(self) -> list[Size]:
        """What sizes the results may have."""
        return sizes_around(self.resolution, self.multiple) if self.aspect_ratio_buckets else [(self.resolution,) * 2]


def load_folder(folder: str | Path, prompt: str | None, plan: ImagePlan) -> list[TrainingImage]:
    """Load every image of a folder (not of its subfolders), in the order of their names.

    A text file beside an image, `dog.txt` beside `dog.png`, holds the prompt of that image; the others get
    `prompt`.

    Args:
        folder: where the images are.
        prompt: the prompt of every image that has none of its own, such as "a sks dog".
        plan: what becomes of each.

    Raises:
        DatasetError: no such folder, no image in it, an image that cannot be read, or an empty or missing prompt.
    """
    return _prepared([(str(path), partial(_read_with_caption, path, prompt)) for path in image_paths(folder)], plan)


def load_dataset(
    folder: str | Path, prompt: str | None, plan: ImagePlan, image_column: str = "image", caption_column: str = "text"
) -> list[TrainingImage]:
    """Load a Hugging Face dataset that `save_to_disk` wrote.

    Args:
        folder: of the dataset; of one with splits, "train" is taken.
        prompt: of every image, if the dataset has no captions.
        plan: what becomes of each.
        image_column: the column of images.
        caption_column: the column of their prompts.

    Raises:
        DatasetError: no such dataset or column, an image that cannot be read, or an empty prompt.
    """
    try:
        import datasets
    except ImportError as error:
        raise DatasetError("Reading a dataset needs the package datasets: pip install datasets.") from error
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{folder} is no dataset that save_to_disk wrote: {error}") from error
    if isinstance(found, dict) and "train" not in found:
        raise DatasetError(f"{folder} has no split 'train'; give the folder of one of its splits: {', '.join(found)}.")
    rows = found["train"] if isinstance(found, dict) else found
    for column in [image_column, *([caption_column] if prompt is None else [])]:
        if column not in rows.column_names:
            raise DatasetError(f"{folder} has no column {column!r}; there are: {', '.join(rows.column_names)}.")

    def read(number: int) -> tuple[Image.Image, str]:
        source = f"{folder}, row {number}"
        try:
            row = rows[number]
        except NO_IMAGE as error:
            raise UnreadableImageError(source, error) from error
        image, caption = row[image_column], prompt if prompt is not None else row[caption_column]
        if not isinstance(image, Image.Image):
            raise UnreadableImageError(source, f"column {image_column!r} holds no image")
        if not isinstance(caption, str):
            raise DatasetError(f"{source} has no prompt in column {caption_column!r}: write one, or give one for all.")
        return image, caption

    return _prepared([(f"{folder}, row {number}", partial(read, number)) for number in range(len(rows))], plan)


def prepare_images(images: Sequence[Image.Image], prompts: str | Sequence[str], plan: ImagePlan) -> list[TrainingImage]:
    """Prepare images that are in memory; `prompts` is one for all of them or one for each.

    Raises:
        DatasetError: there is no image, a prompt is blank, or their numbers differ.
    """
    if not images:
        raise DatasetError("There are no images to train on; the paper uses 3 to 5 of one subject.")
    each = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    if len(each) != len(images):
        raise DatasetError(f"There are {len(images)} images but {len(each)} prompts; give one prompt, or one for each.")
    pairs = list(zip(images, each, strict=True))
    return _prepared(
        [(f"image {number}", partial(pairs.__getitem__, number - 1)) for number in range(1, len(pairs) + 1)], plan
    )


def _prepared(
    readers: Iterable[tuple[str, Callable[[], tuple[Image.Image, str]]]], plan: ImagePlan
) -> list[TrainingImage]:
    """Read and prepare images, each as often as the plan says; bad ones stop it, or are left out."""
    found: list[TrainingImage] = []
    bad = 0
    for source, read in readers:
        try:
            image, prompt = read()
            found += [_prepare(image, prompt, source, plan, repeat) for repeat in range(plan.repeats)]
        except UnreadableImageError as error:
            if plan.on_bad_image == "stop":
                raise
            bad += 1
            _log.warning("%s It is left out.", error)
    if not found:
        raise DatasetError(f"None of the {bad} images can be read.")
    return found


def _prepare(image: Image.Image, prompt: str, source: str, plan: ImagePlan, repeat: int) -> TrainingImage:
    """Turn an image upright, lay it on white where it is transparent, resize it and cut a part of it."""
    if not prompt.strip():
        raise DatasetError('The prompt is empty. Name the subject by a rare word and its class, such as "a sks dog".')
    image = upright_rgb(image, source)
    width, height = nearest(image.size, plan.sizes)
    scale = max(width / image.width, height / image.height)
    down, right = 0.5, 0.5
    if not plan.center_crop:
        down, right = torch.rand(2, generator=generator_for(plan.seed, "crop", source, repeat)).tolist()
    return TrainingImage(
        image=ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=(right, down)),
        prompt=prompt.strip(),
        original_size=(image.height, image.width),
        crop_top_left=(round((image.height * scale - height) * down), round((image.width * scale - width) * right)),
        source=source,
    )


def _read_with_caption(path: Path, prompt: str | None) -> tuple[Image.Image, str]:
    caption = read_caption(path) or prompt
    if caption is None:
        raise DatasetError(f"{path} has no prompt: give one for all images, or write {path.with_suffix('.txt').name}.")
    return read_image(path), caption
