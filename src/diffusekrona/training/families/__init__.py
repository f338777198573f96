"""The families that can be trained, one file each, and which of them a pipeline is of."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from inspect import isclass, signature
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

_log = logging.getLogger(__name__)

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
    """All families: those that installed packages bring, those that were registered, and our own.

    A package whose family cannot be loaded is left out, with a warning that names it.
    """
    brought = [_loaded(point) for point in entry_points(group=PLUGINS)]
    return [*(family for family in brought if family is not None), *_FAMILIES]


@cache  # so that a broken package is imported once, and told once
def _loaded(point: EntryPoint) -> type[Family] | None:
    """The family that an entry point names; None, with a warning, where there is none that works."""
    try:
        family = point.load()
        if not (isclass(family) and issubclass(family, Family)):
            raise TypeError(f"{point.value} is no subclass of Family")
        return family
    except Exception as error:  # whatever a stranger's module raises
        package = point.dist.name if point.dist is not None else "an unknown package"
        told = f"{type(error).__name__}: {error}"
        _log.warning("The family %s of %s (%s) is left out: %s.", point.name, package, point.value, told)
        return None


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
