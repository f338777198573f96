"""Training images: found in a folder, turned upright, made RGB, cropped and resized, each with its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DatasetError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class TrainingImage:
    """One image, ready for the autoencoder, and what the text side has to know about it.

    Args:
        image: RGB, resolution × resolution pixels.
        prompt: what the image shows.
        original_size: (height, width) in pixels before any cropping or resizing, which SDXL conditions on.
        crop_top_left: (top, left) of the crop in pixels of the resized image, which SDXL conditions on.
    """

    image: Image.Image
    prompt: str
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def load_folder(folder: str | Path, prompt: str, resolution: int) -> list[TrainingImage]:
    """Load every PNG, JPEG and WebP image of a folder (not of its subfolders), in the order of their names.

    A text file beside an image, `dog.txt` beside `dog.png`, holds the prompt of that image; the others get
    `prompt`.

    Args:
        folder: where the images are.
        prompt: the prompt of every image that has none of its own, such as "a sks dog".
        resolution: side of the square results in pixels.

    Raises:
        DatasetError: no such folder, no image in it, an image that cannot be read, or an empty caption.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DatasetError(f"There is no image folder {folder} (looked for {folder.absolute()}).")
    paths = sorted(path for path in folder.iterdir() if _is_image(path))
    if not paths:
        raise DatasetError(f"No images in {folder}: it needs at least one {', '.join(IMAGE_SUFFIXES)} file.")
    return [prepare_image(_read(path), _caption(path) or prompt, resolution) for path in paths]


def prepare_image(image: Image.Image, prompt: str, resolution: int) -> TrainingImage:
    """Turn an image upright, lay it on white where it is transparent, crop its middle square, and resize it.

    Args:
        image: of any mode and size; left unchanged.
        prompt: what it shows.
        resolution: side of the square result in pixels.

    Raises:
        DatasetError: the prompt is blank.
    """
    if not prompt.strip():
        raise DatasetError('The prompt is empty. Name the subject by a rare word and its class, such as "a sks dog".')
    image = _rgb(ImageOps.exif_transpose(image))
    width, height = image.size
    scale = resolution / min(width, height)
    return TrainingImage(
        image=ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS),
        prompt=prompt.strip(),
        original_size=(height, width),
        crop_top_left=(round((height * scale - resolution) / 2), round((width * scale - resolution) / 2)),
    )


def prepare_images(images: Sequence[Image.Image], prompts: str | Sequence[str], resolution: int) -> list[TrainingImage]:
    """Prepare images that are in memory; `prompts` is one for all of them or one for each.

    Raises:
        DatasetError: there is no image, a prompt is blank, or their numbers differ.
    """
    if not images:
        raise DatasetError("There are no images to train on; the paper uses 3 to 5 of one subject.")
    each = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    if len(each) != len(images):
        raise DatasetError(f"There are {len(images)} images but {len(each)} prompts; give one prompt, or one for each.")
    return [prepare_image(image, prompt, resolution) for image, prompt in zip(images, each, strict=True)]


def _is_image(path: Path) -> bool:
    # macOS leaves "._name.jpg" files, which hold no image, on foreign disks.
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"The image {path} cannot be read ({error}). Save it again as PNG or JPEG, or take it out of the folder."
        ) from error


def _caption(image_path: Path) -> str | None:
    path = image_path.with_suffix(".txt")
    if not path.is_file():
        return None
    try:
        caption = " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DatasetError(f"The caption {path} is not UTF-8 text. Save it as UTF-8.") from error
    if not caption:
        raise DatasetError(
            f"The caption {path} is empty. "
            f"Write the prompt of {image_path.name} in it, or delete it to use the common one."
        )
    return caption


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys to 255 instead of scaling them.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
