"""Short runs on tiny pipelines, and what they are compared by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusekrona import KronAConfig, inject_krona
from diffusekrona.training import ImagePlan, TrainingConfig, TrainingImage, TrainingResult, fit, prepare_images
from tests.pipelines import IMAGE_SIZE, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline

QUICK = TrainingConfig(max_train_steps=2, learning_rate=1e-2, train_batch_size=2)
PLAN = ImagePlan(IMAGE_SIZE)
PACKAGES = {
    "adamw": "torch",
    "adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "SGD": "torch",
    "lion": "pytorch_optimizer",
    "came": "pytorch_optimizer",
    "adafactor": "pytorch_optimizer",
    "muon": "pytorch_optimizer",
}
"""Of some optimizers."""
OPTIMIZERS = pytest.mark.parametrize("optimizer", PACKAGES)

SMALL = {"target_modules": r".*\.(to_q|q_proj)"}
"""An adapter of few layers, where it does not matter of how many."""

PIPELINES = pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline])
FAMILIES = pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_sd3_pipeline])


def pictures(count: int = 3, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE), seed: int = 0) -> list[Image.Image]:
    """Noise of the same numbers in every call."""
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 255, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def examples(count: int = 2, prompts: str | Sequence[str] = "a sks toy", seed: int = 0) -> list[TrainingImage]:
    return prepare_images(pictures(count, seed=seed), prompts, PLAN)


def adapted(
    build: Callable[[], Any] = tiny_sd_pipeline, *, text_encoders: bool | list[str] = False, **options: Any
) -> tuple[Any, dict[str, nn.Parameter]]:
    """A tiny pipeline and the trainable factors of a fresh adapter, the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = build()
        krona = inject_krona(pipe, KronAConfig(**options), text_encoders=text_encoders)
    return pipe, dict(krona.named_parameters())


def train(
    pipe: Any,
    factors: Mapping[str, nn.Parameter],
    config: TrainingConfig = QUICK,
    on_step: Any = None,
    images: Sequence[TrainingImage] = (),
    **rest: Any,
) -> TrainingResult:
    return fit(pipe, images or examples(), factors, config, on_step, **rest)


def trained(
    config: TrainingConfig = QUICK, build: Callable[[], Any] = tiny_sd_pipeline, dropout: float = 0.0, **rest: Any
) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    """The factors of a fresh run with few of them, and its losses."""
    pipe, factors = adapted(build, text_encoders=config.adapted_encoders, dropout=dropout, **SMALL)
    losses = train(pipe, factors, config, **rest).losses
    return copies(factors), losses


def need(optimizer: str) -> None:
    """Skip the test where the optimizer's package is not installed."""
    pytest.importorskip(PACKAGES[optimizer])


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def weights(pipe: Any) -> dict[str, Tensor]:
    """Every tensor of every module of a pipeline by name."""
    return {
        f"{part}.{name}": tensor
        for part, module in pipe.components.items()
        if isinstance(module, nn.Module)
        for name, tensor in module.state_dict().items()
    }


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def all_close(first: Mapping[str, Tensor], second: Mapping[str, Tensor], **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)
