"""torchvision's VGG-16 and AlexNet with random weights, as files for LPIPS, and LPIPS written out.

Where torchvision is not installed, a stand-in has the two networks' layers, which torchmetrics takes from it. LPIPS
itself is torchmetrics' own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.evaluation.models import IMAGENET_MEAN, IMAGENET_STD

VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Channels of the convolutions; 0 is a pooling."""

TAPS = {"vgg": (2, 7, 14, 21, 28), "alex": (0, 3, 6, 8, 10)}
"""The convolutions after whose ReLU LPIPS compares."""


def vgg16(weights: None = None) -> SimpleNamespace:
    layers, before = [], 3
    for channels in VGG:
        if channels:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
            before = channels
        else:
            layers.append(nn.MaxPool2d(2, 2))
    return SimpleNamespace(features=nn.Sequential(*layers))


def alexnet(weights: None = None) -> SimpleNamespace:
    def convolution(*shape: int, **options: int) -> list[nn.Module]:
        return [nn.Conv2d(*shape, **options), nn.ReLU(inplace=True)]  # type: ignore[arg-type]

    first, second = convolution(3, 64, 11, stride=4, padding=2), convolution(64, 192, 5, padding=2)
    third, fourth = convolution(192, 384, 3, padding=1), convolution(384, 256, 3, padding=1)
    fifth = convolution(256, 256, 3, padding=1)
    pool = [nn.MaxPool2d(3, 2) for _ in range(3)]
    return SimpleNamespace(features=nn.Sequential(*first, pool[0], *second, pool[1], *third, *fourth, *fifth, pool[2]))


NETWORKS = {"vgg": vgg16, "alex": alexnet}


def provide_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed torchvision, or a stand-in with the two networks."""
    pytest.importorskip("torchmetrics")
    if find_spec("torchvision") is not None:
        return
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # which is remembered: transformers shall not take the stand-in for torchvision
    models, package = ModuleType("torchvision.models"), ModuleType("torchvision")
    vars(models).update(vgg16=vgg16, alexnet=alexnet)
    vars(package).update(models=models, __spec__=ModuleSpec("torchvision", None, is_package=True))
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr("torchmetrics.functional.image.lpips._TORCHVISION_AVAILABLE", True)


def save_network(file: Path, network: str, **more: Tensor) -> Path:
    """A network's weights by torchvision's names, and other tensors beside them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = NETWORKS[network]().features
    save_file({f"features.{name}": value for name, value in features.state_dict().items()} | more, file)
    return file


def lpips_by_hand(network: str, weights: dict[str, Tensor], a: Tensor, b: Tensor) -> float:
    """LPIPS of two images (3, height, width), uint8, in float64: equation 1 of Zhang et al. (2018)."""
    library: Any = import_module("torchmetrics.functional.image.lpips")
    linear = torch.load(Path(library.__file__).with_name("lpips_models") / f"{network}.pth", "cpu", weights_only=True)
    total = 0.0
    for layer, (x, y) in enumerate(zip(taps(network, weights, a), taps(network, weights, b), strict=True)):
        difference = functional.normalize(x, dim=1) - functional.normalize(y, dim=1)
        each = linear[f"lin{layer}.model.1.weight"].double() * difference.square()
        total += each.sum(1).mean().item()
    return total


def taps(network: str, weights: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
    mean, std = (torch.tensor(values).double()[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    state = ((pixels.double() / 255 - mean) / std)[None]
    found = []
    for place, layer in enumerate(NETWORKS[network]().features):
        if isinstance(layer, nn.Conv2d):
            weight, bias = (weights[f"features.{place}.{part}"].double() for part in ("weight", "bias"))
            state = functional.conv2d(state, weight, bias, layer.stride, layer.padding).relu()
            if place in TAPS[network]:
                found.append(state)
        elif isinstance(layer, nn.MaxPool2d):
            state = functional.max_pool2d(state, layer.kernel_size, layer.stride)
    return found
