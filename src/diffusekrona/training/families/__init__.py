"""The families that can be trained, one file each, and which of them a pipeline is of."""

from __future__ import annotations

from importlib.metadata import entry_points
from inspect import signature
from typing import Any

from ...errors import UnsupportedPipelineError
from .chroma import Chroma
from .family import Family
from .flux import Flux
from .flux2 import Flux2
from .krea2 import Krea2
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .wan import Wan
from .zimage import ZImage

__all__ = ["Family", "families", "family_of", "register_family"]

PLUGINS = "diffusekrona.families"
"""Group of the entry points by which installed packages name families of their own."""

_FAMILIES: list[type[Family]] = [
    StableDiffusion,
    StableDiffusion3,
    Flux,
    Flux2,
    Chroma,
    ZImage,
    QwenImage,
    Krea2,
    Sana,
    PixArt,
    Wan,
]


def register_family(family: type[Family]) -> type[Family]:
    """Make a family known; also as a decorator. It comes before those that have the same denoiser."""
    _FAMILIES.insert(0, family)
    return family


def families() -> list[type[Family]]:
    """All families: those that installed packages bring, those that were registered, and our own."""
    return [*(point.load() for point in entry_points(group=PLUGINS)), *_FAMILIES]


def family_of(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        UnsupportedPipelineError: none of those that are known, or not for text to image.
    """
    known = families()
    for family in known:
        denoiser = getattr(pipe, family.PART, None)
        if type(getattr(denoiser, "_orig_mod", denoiser)).__name__ == family.DENOISER:
            if getattr(pipe, "vae", None) is None or not hasattr(pipe, "encode_prompt"):
                break
            if "image" in signature(pipe.encode_prompt).parameters:  # prompts about an image, which is to be edited
                break
            return family(pipe)
    names = list(dict.fromkeys(family.NAME for family in known))
    raise UnsupportedPipelineError(
        f"{type(pipe).__name__} is none of the pipelines that can be trained, which are those from text to image of "
        f"{', '.join(names[:-1])} and {names[-1]}. The documentation's page Families shows how to add one."
    )
