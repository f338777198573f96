"""The methods on tiny pipelines: each with options that suit these, and what is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusekrona.training import TrainingConfig, fit
from research.methods import CustomDiffusion, FullDreamBooth, KronA, LoHa, LoKr, LoRA, Method, SVDiff
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import examples

SDXL: list[Method] = [
    KronA(4, 16),
    KronA(4, 16, num_terms=2),
    KronA(4, 16, factor_pattern={"to_k|to_v": (2, 8)}),
    LoRA(2),
    LoKr(factor=8),
    LoKr(2, factor=4),
    LoHa(2),
    FullDreamBooth(),
    CustomDiffusion(),
    SVDiff(),
]
SD: list[Method] = [
    KronA(4, 16, text_encoders=True),
    LoRA(2, text_encoders=True),
    LoKr(2, factor=4, text_encoders=True),
    LoHa(2, text_encoders=True),
    FullDreamBooth(text_encoders=True),
    CustomDiffusion(),
    SVDiff(text_encoders=True),
]


def name_of(value: Any) -> str:
    return value.__name__.split("_")[1] if callable(value) else f"{value.name}-{list(value.options().values())}"


CASES = pytest.mark.parametrize(
    ("build", "method"),
    [(tiny_sdxl_pipeline, method) for method in SDXL] + [(tiny_sd_pipeline, method) for method in SD],
    ids=name_of,
)
IN_SD = pytest.mark.parametrize("method", SD, ids=name_of)


def picture(pipe: Any) -> np.ndarray:
    """What a pipeline draws, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a toy", num_inference_steps=2, generator=generator, output_type="np").images


def train(pipe: Any, method: Method, parameters: dict[str, nn.Parameter], **options: Any) -> None:
    config = TrainingConfig(
        max_train_steps=2, learning_rate=1e-2, train_text_encoder=method.text_encoders, adam_weight_decay=0.0, **options
    )
    fit(pipe, examples(1), parameters, config)


def shake(parameters: dict[str, nn.Parameter]) -> None:
    """Move what trains off its start, as training would, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def tensors(pipe: Any) -> dict[str, Tensor]:
    """Every parameter and buffer of a pipeline, copied; those of layers in wrappers by their names without these."""
    return {
        f"{part}.{name}".replace(".base_layer", ""): tensor.detach().clone()
        for part, module in pipe.components.items()
        if isinstance(module, nn.Module)
        for name, tensor in module.state_dict().items()
    }
