"""Training images: found, turned upright, made RGB, cropped and resized to one size or to buckets, with prompts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from pydantic import Field, model_validator

from ..errors import DatasetError, TrainingConfigError
from ..inputs.captions import read_captions
from ..inputs.images import NO_IMAGE, UnreadableImageError, read_image, upright_alpha, upright_rgb
from .config import ImageSettings
from .dataset_rows import named_rows, saved_rows
from .image_folder import image_folders
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
        mask: grey, white where the loss counts; None where it counts everywhere.
    """

    image: Image.Image
    prompt: str
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    source: str = "an image"
    mask: Image.Image | None = None

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

    @model_validator(mode="after")
    def _check_multiple(self) -> ImagePlan:
        for side in self.extra_resolutions:
            if side % self.multiple:
                raise TrainingConfigError(f"extra_resolutions {side} is not divisible by {self.multiple}.")
        return self

    @property
    def resolutions(self) -> list[int]:
        """Sides of the results."""
        return [self.resolution, *self.extra_resolutions]

    def sizes_at(self, resolution: int) -> list[Size]:
        """The sizes that results of one resolution may have."""
        return sizes_around(resolution, self.multiple) if self.aspect_ratio_buckets else [(resolution,) * 2]


def load_folder(
    folder: str | Path,
    prompt: str | None,
    plan: ImagePlan,
    caption_column: str = "text",
    only: Collection[str] | None = None,
) -> list[TrainingImage]:
    """Load every image of a folder, in the order of their names, and of its subfolders as kohya's scripts name them.

    An image's caption is its prompt; see `read_captions` for where it may be. The others get `prompt`. Images of a
    subfolder `10_sks toy` are used ten times as often, and without `prompt`, "sks toy" is theirs. What is in the
    folder and not used is logged as a warning. A black and white picture `dog-masklabel.png` or `dog.mask.png` is the
    mask of `dog.png`, white where the loss counts.

    Args:
        folder: where the images are.
        prompt: the prompt of every image that has none of its own, such as "a sks dog".
        plan: what becomes of each.
        caption_column: the column of captions in the folder's metadata.
        only: names of the files to take, where these are not all.

    Raises:
        DatasetError: no such folder, no image in it, an image that cannot be read, or an empty or missing prompt.
    """
    found: list[_Source] = []
    passed_over: list[str] = []
    for part in image_folders(folder):
        captions = read_captions(part.folder, [path.name for path in part.images], caption_column)
        common = part.prompt if prompt is None else prompt
        for path in part.images:
            if only is not None and path.name not in only:
                passed_over.append(f"{path.name} (not asked for)")
                continue
            read = partial(_read, path, captions.by_name.get(path.name, common), part.masks.get(path))
            found.append(_Source(str(path), read, part.repeats))
        passed_over += part.passed_over(captions.files)
        passed_over += [f"{name} (in a table, but not in the folder)" for name in captions.without_image]
    if passed_over:
        _log.warning("Of %s, %d images are used; passed over: %s.", folder, len(found), some(passed_over))
    return _prepared(found, plan)


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
    return _of_rows(saved_rows(folder), str(folder), prompt, plan, image_column, caption_column)


def load_named_dataset(
    name: str,
    config: str | None,
    prompt: str | None,
    plan: ImagePlan,
    image_column: str = "image",
    caption_column: str = "text",
) -> list[TrainingImage]:
    """Load the split "train" of a dataset of the Hugging Face hub, or of a folder that is laid out like one.

    Args:
        name: a folder, or an id on the hub.
        config: which of its configurations, where it has several.
        prompt: of every image, if the dataset has no captions.
        plan: what becomes of each.
        image_column: the column of images.
        caption_column: the column of their prompts.

    Raises:
        DatasetError: no such dataset or column, an image that cannot be read, or an empty prompt.
    """
    return _of_rows(named_rows(name, config), name, prompt, plan, image_column, caption_column)


def _of_rows(
    rows: Any, name: str, prompt: str | None, plan: ImagePlan, image_column: str, caption_column: str
) -> list[TrainingImage]:
    """The images of a dataset's rows, which come from the place of that name."""
    for column in [image_column, *([caption_column] if prompt is None else [])]:
        if column not in rows.column_names:
            raise DatasetError(f"{name} has no column {column!r}; there are: {', '.join(rows.column_names)}.")

    def read(number: int) -> _Read:
        source = f"{name}, row {number}"
        try:
            row = rows[number]
        except NO_IMAGE as error:
            raise UnreadableImageError(source, error) from error
        image, caption = row[image_column], prompt if prompt is not None else row[caption_column]
        if not isinstance(image, Image.Image):
            raise UnreadableImageError(source, f"column {image_column!r} holds no image")
        if not isinstance(caption, str):
            raise DatasetError(f"{source} has no prompt in column {caption_column!r}: write one, or give one for all.")
        return _Read(image, caption)

    return _prepared([_Source(f"{name}, row {number}", partial(read, number)) for number in range(len(rows))], plan)


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
    pairs = enumerate(zip(images, each, strict=True), 1)
    return _prepared([_Source(f"image {number}", partial(_Read, *pair)) for number, pair in pairs], plan)


class _Read(NamedTuple):
    """An image as it was found, what it shows, and its mask, if it has one."""

    image: Image.Image
    prompt: str
    mask: Image.Image | None = None


class _Source(NamedTuple):
    """Where an image comes from, how to read it, and how often it is used."""

    name: str
    read: Callable[[], _Read]
    repeats: int = 1


def _prepared(sources: Iterable[_Source], plan: ImagePlan) -> list[TrainingImage]:
    """Read and prepare images, each as often as it shall be used; bad ones stop it, or are left out."""
    found: list[TrainingImage] = []
    bad, small = 0, []
    for source in sources:
        try:
            image = _upright(source.read(), source.name)
            sizes = [nearest(image.image.size, plan.sizes_at(side)) for side in plan.resolutions]
            if any(_scale(image.image, size) > 1 for size in sizes):
                small.append(f"{source.name} ({image.image.width} x {image.image.height})")
                if plan.on_small == "skip":
                    continue
            found += _repeated(image, source, sizes, plan)
        except UnreadableImageError as error:
            if plan.on_bad_image == "stop":
                raise
            bad += 1
            _log.warning("%s It is left out.", error)
    _tell_small(small, plan)
    if not found:
        raise DatasetError(f"None of the {bad + len(small)} images can be used, as the warnings above say.")
    if plan.masked_loss and all(image.mask is None for image in found):
        raise DatasetError(
            "masked_loss is on, but no image has a mask: neither a transparent part, nor a file such as "
            "dog-masklabel.png beside dog.png."
        )
    return found


def _tell_small(small: Sequence[str], plan: ImagePlan) -> None:
    if not small:
        return
    told = f"Smaller than the resolution of {max(plan.resolutions)} pixels: {some(small)}."
    if plan.on_small == "stop":
        raise DatasetError(f"{told} Take a smaller resolution or larger images, or set on_small to upscale or skip.")
    _log.warning("%s They are %s.", told, "enlarged" if plan.on_small == "upscale" else "left out")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _upright(read: _Read, source: str) -> _Read:
    """Turned upright, in RGB, on white where it is transparent; the mask is what is not, if it has none of its own.

    Raises:
        DatasetError: there is no prompt, or the mask has another shape.
        UnreadableImageError: the pixels cannot be decoded.
    """
    if not read.prompt.strip():
        raise DatasetError('The prompt is empty. Name the subject by a rare word and its class, such as "a sks dog".')
    image, mask = upright_rgb(read.image, source), read.mask
    if mask is not None:
        mask = upright_rgb(mask, source).convert("L")
    elif read.image.has_transparency_data:
        mask = upright_alpha(read.image)
    if mask is not None and mask.size != image.size:
        raise DatasetError(f"The mask of {source} is {mask.width} x {mask.height} pixels, but the image is not.")
    return _Read(image, read.prompt.strip(), mask)


def _scale(image: Image.Image, size: Size) -> float:
    """By how much an image is enlarged so that it covers a size."""
    return max(size[0] / image.width, size[1] / image.height)


def _repeated(image: _Read, source: _Source, sizes: Sequence[Size], plan: ImagePlan) -> Iterator[TrainingImage]:
    """An image in each of some sizes as often as it is used; where the middle is cut out, all of a size are one."""
    repeats = source.repeats * plan.repeats
    for size in sizes:
        if plan.center_crop:
            yield from [_cut(image, source.name, size, (0.5, 0.5), plan)] * repeats
            continue
        for repeat in range(repeats):
            place = torch.rand(2, generator=generator_for(plan.seed, "crop", source.name, repeat)).tolist()
            yield _cut(image, source.name, size, (place[0], place[1]), plan)


def _cut(image: _Read, source: str, size: Size, place: tuple[float, float], plan: ImagePlan) -> TrainingImage:
    """Resize an image and cut out a part of it, which lies so far down and to the right, from 0 to 1."""
    (width, height), (down, right), whole = size, place, image.image
    scale = _scale(whole, size)
    fitted = partial(ImageOps.fit, size=size, centering=(right, down))
    return TrainingImage(
        image=fitted(whole, method=Image.Resampling.LANCZOS),
        prompt=image.prompt,
        original_size=(whole.height, whole.width),
        crop_top_left=(round((whole.height * scale - height) * down), round((whole.width * scale - width) * right)),
        source=source,
        mask=fitted(image.mask, method=Image.Resampling.BOX) if plan.masked_loss and image.mask is not None else None,
    )


def _read(path: Path, prompt: str | None, mask: Path | None) -> _Read:
    if prompt is None:
        raise DatasetError(f"{path} has no prompt: give one for all images, or write {path.with_suffix('.txt').name}.")
    return _Read(read_image(path), prompt, None if mask is None else read_image(mask))
