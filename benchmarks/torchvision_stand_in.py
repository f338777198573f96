"""The few transforms of torchvision that Diffusers' training scripts use, where torchvision is not installed.

For measuring memory only: results are of the same size and type as torchvision's.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def install() -> None:
    """Let `from torchvision import transforms` find these."""
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # which is remembered: the libraries shall not take this for torchvision
    kinds = (InterpolationMode, Resize, CenterCrop, RandomCrop, RandomHorizontalFlip, ToTensor, Normalize, Compose)
    parts: dict[str, dict[str, Any]] = {
        "torchvision.transforms.functional": {name: globals()[name] for name in FUNCTIONS},
        "torchvision.transforms": {kind.__name__: kind for kind in kinds},
        "torchvision": {},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        vars(module).update(content)
        sys.modules[name] = module
    transforms: Any = sys.modules["torchvision.transforms"]
    transforms.functional = sys.modules["torchvision.transforms.functional"]
    sys.modules["torchvision"].transforms = transforms  # type: ignore[attr-defined]


class InterpolationMode(enum.Enum):
    """How `Resize` interpolates."""

    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    LANCZOS = Image.Resampling.LANCZOS


class Resize:
    """Make the shorter side this long."""

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        self.size, self.method = size, interpolation.value

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = self.size / min(image.size)
        return image.resize((round(image.width * scale), round(image.height * scale)), self.method)


class RandomCrop:
    """A square; the same one each time."""

    def __init__(self, size: int) -> None:
        self.size = size

    @staticmethod
    def get_params(img: Image.Image, output_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height, width."""
        height, width = output_size
        return (img.height - height) // 2, (img.width - width) // 2, height, width

    def __call__(self, image: Image.Image) -> Image.Image:
        return crop(image, *self.get_params(image, (self.size, self.size)))


class CenterCrop(RandomCrop):
    """The middle square."""


class RandomHorizontalFlip:
    """Mirror an image."""

    def __init__(self, p: float = 0.5) -> None:
        del p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image)


class ToTensor:
    """(3, height, width) in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    """Take the mean off and divide by the standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class Compose:
    """One after the other."""

    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


FUNCTIONS = ("center_crop", "crop", "hflip", "normalize", "resize", "to_tensor")


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle, of a height and a width."""
    return crop(image, *RandomCrop.get_params(image, size))


def hflip(image: Image.Image) -> Image.Image:
    """Mirrored."""
    return ImageOps.mirror(image)


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Without the mean, over the standard deviation."""
    return Normalize(mean, std)(image)


def resize(
    image: Image.Image, size: Sequence[int], interpolation: InterpolationMode = InterpolationMode.BILINEAR
) -> Image.Image:
    """Of this height and width."""
    return image.resize((size[1], size[0]), interpolation.value)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) in [0, 1]."""
    return ToTensor()(image)


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """A part of an image."""
    return image.crop((left, top, left + width, top + height))
