"""LPIPS, a perceptual distance, by torchmetrics, with a network whose weights the user gives.

torchmetrics and torchvision are loaded at the first use and required by no extra: torchvision has to be the build that
goes with the installed torch. Nothing is fetched but a repository of the hub that the user names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import AdapterFileError, EvaluationError
from ..storage import open_safetensors, resolve
from . import VGG16
from .metrics import Score

SIDE = 256
"""Pixels of a side of what is compared: the middle square of an image, which makes all images of one size."""

_NETWORKS = {
    frozenset({0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28}): "vgg",
    frozenset({0, 3, 6, 8, 10}): "alex",
}
"""LPIPS's name of a network by the places of its convolutions in torchvision's `features`."""

_TAKES = (
    "lpips takes the weights of torchvision's vgg16 or alexnet in safetensors: a file, a folder that holds one, or a "
    f"repository of the hub such as {VGG16}."
)


class Lpips:
    """The distance of Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018).

    It is Σ_l mean_p w_l · (f_lp − g_lp)², where f_lp and g_lp are the features of two images at the layer l and the
    place p, each of length 1, and w_l ≥ 0 the layer's weights of version 0.1, which torchmetrics brings. It is 0 for
    equal images, and less is nearer.

    Args:
        source: weights of torchvision's vgg16 or alexnet in safetensors: a file, a folder that holds one, or an id on
            the hub, with "@" a revision of it. Which of the two networks it is, the names in the file say.
        device: where it runs.
        batch_size: real images per pass.

    Attributes:
        source: as it was asked for.
        revision: the hub's commit; None for a file or folder.
        network: "vgg" or "alex", whose distances cannot be compared with each other.

    Raises:
        EvaluationError: a package is missing or cannot be loaded, or the weights are not there, cannot be fetched, are
            no safetensors, or of another network.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu", batch_size: int = 16) -> None:
        self.source = str(source)
        untrained = _lpips_class()
        file, self.revision = _weights_file(self.source)
        weights = _features(file)
        self.network = _network_of(weights, file)
        self._batch_size = batch_size
        self._device = torch.device(device)
        with torch.random.fork_rng(devices=[]):  # which its network is made with, to be replaced
            net = untrained(net=self.network, pnet_rand=True)
        self._net = _with_weights(net, weights, file).to(self._device)

    def pixels(self, image: Image.Image) -> Tensor:
        """The middle square of an RGB image, (3, `SIDE`, `SIDE`), uint8, resized by Pillow (bicubic)."""
        square = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()

    @torch.inference_mode()
    def distances(self, one: Tensor, others: Sequence[Tensor]) -> list[float]:
        """The distance of an image to each of some others, all as `pixels` gives them.

        Raises:
            EvaluationError: a distance is not finite.
        """
        found: list[float] = []
        for start in range(0, len(others), self._batch_size):
            batch = torch.stack(list(others[start : start + self._batch_size]))
            # One image goes through the network once; the library's differences broadcast.
            between = self._net(self._unit(batch), self._unit(one[None]), normalize=True)
            found += between.double().flatten().tolist()
        if not all(map(np.isfinite, found)):
            raise EvaluationError(f"A distance of LPIPS is not finite, so the weights {self.source} are damaged.")
        return found

    def _unit(self, pixels: Tensor) -> Tensor:
        return pixels.to(self._device, torch.float32) / 255


class LpipsOfSubject:
    """LPIPS of one subject's generated images to its real ones, measured while they pass on their way elsewhere.

    Args:
        lpips: the distance; None measures nothing.
    """

    def __init__(self, lpips: Lpips | None) -> None:
        self._lpips = lpips
        self._real: list[Tensor] = []
        self._values: list[float] = []

    def real(self, images: Iterable[Image.Image]) -> Iterator[Image.Image]:
        """The same images, which are kept small; they go before the generated ones."""
        for image in images:
            if self._lpips is not None:
                self._real.append(self._lpips.pixels(image))
            yield image

    def generated(self, images: Iterable[Image.Image]) -> Iterator[Image.Image]:
        """The same images, each of which is compared with all real ones."""
        for image in images:
            if self._lpips is not None:
                distances = self._lpips.distances(self._lpips.pixels(image), self._real)
                self._values.append(fsum(distances) / len(distances))
            yield image

    def score(self) -> Score | None:
        """The mean distance of each generated image to the real ones; None where nothing was measured."""
        return None if self._lpips is None else Score(tuple(self._values))


def _lpips_class() -> Any:
    """LPIPS of torchmetrics as a module, with a choice of the network's weights.

    It is not public there. The public class and function are a shell around it that always has torchvision fetch the
    network, as a pickle.
    """
    missing = [package for package in ("torchmetrics", "torchvision") if find_spec(package) is None]
    if missing:
        raise EvaluationError(
            f"LPIPS needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed: "
            f"pip install {' '.join(missing)}. Take the torchvision that goes with torch {torch.__version__}."
        )
    try:
        import_module("torchvision")
        return import_module("torchmetrics.functional.image.lpips")._NoTrainLpips
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise EvaluationError(
            f"LPIPS needs torchmetrics and torchvision, which cannot be loaded: {error}. torchvision must be the build "
            f"that goes with torch {torch.__version__}."
        ) from error


def _with_weights(lpips: Any, weights: dict[str, Tensor], file: Path) -> Any:
    own = {name: re.sub(r"^slice\d+\.", "features.", name) for name in lpips.net.state_dict()}
    try:
        lpips.net.load_state_dict({name: weights[source].float() for name, source in own.items()})
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise EvaluationError(
            f"{file} is not of LPIPS's network {lpips.pnet_type}, as which it names its layers: {reason}. {_TAKES}"
        ) from error
    return lpips


def _weights_file(source: str) -> tuple[Path, str | None]:
    """The file that a source names, and the hub's commit if it is of the hub."""
    name, _, revision = source.partition("@")
    local = Path(source).expanduser()
    if not local.exists() and revision and Path(name).expanduser().exists():
        raise EvaluationError(f"{name} is here and not on the hub, so it has no revision {revision}. {_TAKES}")
    try:
        found = local if local.exists() else resolve(name, revision=revision or None)
    except AdapterFileError as error:
        raise EvaluationError(f"The weights of LPIPS cannot be found: {error} {_TAKES}") from error
    if found.is_file():
        return found, None
    files = sorted(found.glob("*.safetensors"))
    if len(files) != 1:
        what = "no" if not files else f"{len(files)}"
        raise EvaluationError(f"{found} holds {what} safetensors files, and LPIPS needs one. {_TAKES}")
    return files[0], None if found == local else found.name


def _features(file: Path) -> dict[str, Tensor]:
    """The convolutions of torchvision's networks, without the classifier behind them."""
    try:
        with open_safetensors(file) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if name.startswith("features.")}  # noqa: SIM118
    except AdapterFileError as error:
        raise EvaluationError(f"The weights of LPIPS cannot be read: {error} {_TAKES}") from error


def _network_of(weights: dict[str, Tensor], file: Path) -> str:
    places = frozenset(int(found[1]) for name in weights if (found := re.match(r"features\.(\d+)\.", name)))
    if places not in _NETWORKS:
        raise EvaluationError(f"{file} does not hold the layers of vgg16 or alexnet. {_TAKES}")
    return _NETWORKS[places]
