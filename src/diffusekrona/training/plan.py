"""What a run would take, before anything is loaded: parameters, memory, steps per epoch."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..architectures import default_dtype
from ..base import BaseModelError, base_configs
from ..components import adaptable_components
from ..interchange.weights import folder_components
from ..pipeline import inject_krona
from .families import family_of
from .run import image_plan, training_images
from .settings import Settings

MOMENTS = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}
"""Bytes of an optimizer's state for each parameter."""


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        parameters: that are trained.
        share: of the base's.
        images: of the subject, repeats counted.
        steps_per_epoch: optimizer steps in which each image is seen once, in one process.
        epochs: how often each image is seen.
        weights: bytes of the models that are run in each step.
        state: bytes of factors, gradients, the optimizer's state and averages.
        activations: bytes that the denoiser's forward pass keeps for the backward pass, and that one recomputed block
            takes; somewhat too many, as the fused step is not used here. Text encoders' do not count.
    """

    parameters: int
    share: float
    images: int
    steps_per_epoch: float
    epochs: float
    weights: int
    state: int
    activations: int

    @property
    def memory(self) -> int:
        """Bytes at the peak of a step, without what the device's libraries take for themselves."""
        return self.weights + self.state + self.activations


def plan_table(found: Plan) -> Table:
    """A plan for people."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("trained parameters", f"{found.parameters:,} ({found.share:.3%} of the base's)"),
        ("images", f"{found.images}"),
        ("steps per epoch", f"{found.steps_per_epoch:g}, each image is seen {found.epochs:g} times"),
        ("memory, about", decimal(found.memory)),
        ("  frozen weights", decimal(found.weights)),
        ("  kept for the backward pass", decimal(found.activations)),
        ("  factors, gradients, optimizer", decimal(found.state)),
    ):
        table.add_row(name, value)
    return table


def plan(settings: Settings) -> Plan:
    """What a run of these settings would take, by a forward pass of tensors without numbers.

    Raises:
        KronAError: the base has no configuration that can be read, or the images or the adapter do not suit it.
    """
    data, training = settings.data, settings.training
    folder = base_configs(data.pretrained_model_name_or_path)
    vae = _vae_config(folder)
    reduction = 2 ** (len(vae["block_out_channels"]) - 1)
    with FakeTensorMode(), default_dtype(getattr(torch, data.dtype)):
        parts = folder_components(folder, device="cpu")
        pipe: Any = SimpleNamespace(
            components=parts, vae=SimpleNamespace(config=SimpleNamespace(**vae)), scheduler=True, tokenizer=True,
            tokenizer_2=True, encode_prompt=True, **parts,
        )  # fmt: skip
        family = family_of(pipe)
        denoiser: Any = family.denoiser
        adapted = adaptable_components(pipe) if training.train_text_encoder else {"": denoiser}
        of_base = sum(p.numel() for module in adapted.values() for p in module.parameters())
        krona = inject_krona(pipe, settings.adapter.config(), text_encoders=training.train_text_encoder)
        side = data.resolution or denoiser.config.sample_size * reduction
        images = training_images(settings, image_plan(settings, side, reduction))
        weights = sum(p.nbytes for module in adapted.values() for p in module.parameters())
        latents = torch.empty(
            training.train_batch_size, vae["latent_channels"], side // reduction, side // reduction, dtype=family.dtype
        )
        denoiser.train()
        activations = _kept(
            denoiser,
            lambda: family.predict(
                latents,
                torch.zeros(len(latents), dtype=torch.long),
                family.example(len(latents)),
                torch.empty(len(latents), 6),
            ),
            training.gradient_checkpointing,
        )
    parameters = sum(p.numel() for p in krona.parameters())
    per_parameter = 8 + MOMENTS[training.optimizer] + (4 if training.ema_decay is not None else 0)
    per_step = training.train_batch_size * training.gradient_accumulation_steps
    return Plan(
        parameters=parameters,
        share=parameters / of_base,
        images=len(images),
        steps_per_epoch=len(images) / per_step,
        epochs=training.max_train_steps * per_step / len(images),
        weights=weights,
        state=parameters * per_parameter,
        activations=activations,
    )


def _vae_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{folder} has no autoencoder's configuration that can be read: {error}") from error
    return config


def _kept(denoiser: Any, forward: Callable[[], Tensor], checkpointing: bool) -> int:
    """Bytes that a forward pass keeps, and with checkpointing the most that a block keeps while it is recomputed."""
    whole, blocks = _Kept(denoiser), [0]

    def block(function: Any, *inputs: Any) -> Any:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                whole.keep(tensor)
        inside = _Kept(denoiser)
        with inside.counting():
            outputs = function(*inputs)
        blocks.append(inside.bytes)
        return outputs

    if checkpointing:
        denoiser.enable_gradient_checkpointing(block)
    with whole.counting():
        forward()
    return whole.bytes + max(blocks)


class _Kept:
    """What is kept for the backward pass: each memory once, and a module's own weights not."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self._seen: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor."""
        if tensor.untyped_storage()._cdata not in self._own:
            self._seen[tensor.untyped_storage()._cdata] = tensor  # which keeps the number from being given anew
        return tensor

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())

    def counting(self) -> AbstractContextManager[Any]:
        """Count all that autograd keeps meanwhile."""
        return torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
