"""What a run would take, before anything is loaded: parameters, memory, steps per epoch."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn

from ..bases.architectures import default_dtype
from ..bases.loading import BaseModelError, base_configs
from ..bases.quantization import BYTES, PACKAGES
from ..files.merge_base import folder_components
from ..pipeline import inject_krona
from ..tuner.compat import fake_tensors, recompute_blocks, storage_key
from ..tuner.injected import krona_layers
from .batches import text_encoders, trained_encoders
from .config import ENCODER_RATES, TrainingConfig
from .dreambooth import training_resolution
from .families import family_of
from .offload import blocks_of
from .optimizer_names import check_optimizer
from .optimizers import optimizer_of, optimizer_state
from .run import image_plan, training_images
from .settings import Settings


class SavedTensors:
    """The tensors that autograd saves for the backward pass: each memory once, and modules' own weights not.

    Args:
        modules: whose weights are there anyway.
        copied: weights of theirs of which a copy is saved nevertheless.
    """

    def __init__(self, modules: Iterable[nn.Module], copied: Iterable[Tensor] = ()) -> None:
        self._own = {storage_key(p) for module in modules for p in module.parameters()}
        self._own -= {storage_key(weight) for weight in copied}
        self._seen: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor."""
        key = storage_key(tensor)
        if key not in self._own:
            self._seen[key] = tensor  # so that its number is not given anew
        return tensor

    def clear(self) -> None:
        """Let go of all that was counted."""
        self._seen.clear()

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())

    def counting(self) -> AbstractContextManager[Any]:
        """Count all that autograd saves meanwhile."""
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)


MOMENTS = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2, "prodigy": 16}
"""Bytes of an optimizer's state for each parameter; those of others are measured."""

T5_TOKENS = 256
"""Of a prompt, as Stable Diffusion 3's pipeline takes it."""


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        parameters: that are trained.
        share: of the base's.
        images: of the subject, repeats counted.
        steps_per_epoch: optimizer steps in which each image is seen once, in one process.
        epochs: how often each image is seen.
        encoders: bytes of the models that run before the first step only, none where they run in each one.
        weights: bytes of the models that are run in each step; of quantized layers, about, and of blocks that wait
            elsewhere, the largest one's.
        state: bytes of factors, gradients, the optimizer's state and averages.
        activations: bytes that a forward pass of the denoiser, and of text encoders that are trained, keeps for the
            backward pass, and that one recomputed block takes; somewhat too many, as the fused step is not used here.
        drawing: bytes of all models at once and of the state, where validation or class images are drawn, else none.
    """

    parameters: int
    share: float
    images: int
    steps_per_epoch: float
    epochs: float
    encoders: int
    weights: int
    state: int
    activations: int
    drawing: int = 0

    @property
    def memory(self) -> int:
        """Bytes at the peak on the device: of a step, of encoding before it, or of drawing pictures.

        Without what the device's libraries take for themselves, and what encoders and pictures are computed with.
        """
        return max(self.weights + self.state + self.activations, self.encoders, self.drawing)


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
        ("memory before the first step", f"{decimal(found.encoders)}, of encoders that the steps do not need"),
        ("memory while pictures are drawn", f"{decimal(found.drawing)}, of all models at once"),
    ):
        table.add_row(name, value)
    return table


def plan(settings: Settings) -> Plan:
    """What a run of these settings would take, by a forward pass of tensors without numbers.

    Raises:
        KronAError: the base has no configuration that can be read, or the images or the adapter do not suit it.
    """
    training = settings.training
    check_optimizer(training)
    folder = base_configs(settings.data.pretrained_model_name_or_path)
    index = _index(folder)
    scheduler = _configured(folder / "scheduler", index.get("scheduler"))  # which computes with numbers as it is made
    with fake_tensors(), default_dtype(getattr(torch, settings.base_dtype)):
        pipe = _pipeline(folder, index, scheduler)
        family = family_of(pipe)
        denoiser = family.denoiser
        encoders = text_encoders(pipe)
        trained = [denoiser, *trained_encoders(pipe, training)]
        of_base = sum(p.numel() for module in trained for p in module.parameters())
        krona = inject_krona(
            pipe,
            settings.adapter.config(),
            text_encoders=training.adapted_encoders,
            denoiser=training.train_denoiser,
        )
        side = training_resolution(pipe, settings.images.resolution)
        images = training_images(settings, image_plan(settings, side, family.reduction))
        texts = min(training.train_batch_size, len({image.prompt for image in images}))
        stored = {id(part): settings.quantization.of(name) for name, part in pipe.components.items()}
        copied = [weight for module in trained for weight in _copied(module, stored[id(module)])]
        activations = _activation_bytes(trained, copied, partial(_forward, pipe, training, side, texts), training)
        steps = [*trained, *(encoders if training.train_text_encoder else [])]  # one that is trained, and all run
        idle = [module for module in (pipe.vae, *encoders) if module not in steps]
        factors = set(krona.parameters())
        weights, others = _bytes(dict.fromkeys(steps), stored, factors), _bytes(idle, stored)
        all_models = weights + others
        if training.offload != "none":  # then one block is there at a time
            blocks = [_bytes([block], {id(block): None}, factors) for block in blocks_of(denoiser)]
            weights -= sum(blocks) - max(blocks, default=0)
    training = training.in_steps(len(images), 1)
    parameters = sum(p.numel() for p in krona.parameters())
    per_parameter = 8 + (4 if training.ema_decay is not None else 0)
    moments = _moment_bytes([tuple(p.shape) for p in krona.parameters()], training)
    per_step = training.train_batch_size * training.gradient_accumulation_steps
    state = parameters * per_parameter + moments
    draws = bool(settings.output.validation_prompt) or settings.prior.with_prior_preservation
    return Plan(
        parameters=parameters,
        share=parameters / of_base,
        images=len(images),
        steps_per_epoch=len(images) / per_step,
        epochs=training.max_train_steps * per_step / len(images),
        encoders=0 if training.cache == "none" else others,
        weights=weights + (others if training.cache == "none" else 0),
        state=state,
        activations=activations,
        drawing=all_models + state if draws else 0,
    )


def _moment_bytes(shapes: Sequence[tuple[int, ...]], training: TrainingConfig) -> int:
    """Of the optimizer's state: as `MOMENTS` says, or as a step on one parameter of each shape leaves."""
    if training.optimizer in MOMENTS:
        return MOMENTS[training.optimizer] * sum(math.prod(shape) for shape in shapes)
    found = 0
    for shape, count in Counter(shapes).items():
        parameter = nn.Parameter(torch.zeros(shape))
        plain = dict.fromkeys(("text_encoders_to_train", *ENCODER_RATES))
        config = training.replace(train_text_encoder=False, train_denoiser=True, loraplus_lr_ratio=1.0, **plain)
        optimizer = optimizer_of({"a": parameter}, config)
        parameter.grad = torch.ones(shape)
        optimizer.step()
        found += count * sum(tensor.nbytes for tensor in optimizer_state(optimizer)[0].values())
    return found


def _index(folder: Path) -> dict[str, Any]:
    """The classes of a pipeline and of its parts by name, None for parts that it has not; and its options."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        found = {name: value[1] if _is_part(value) else value for name, value in index.items()}
        return {**found, "kind": getattr(diffusers, found["_class_name"]), "vae": found["vae"]}
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise BaseModelError(f"{folder} has no model_index.json of a pipeline that can be read: {error}") from error


def _is_part(entry: Any) -> bool:
    """Whether an entry of a pipeline's index is a part's library and class, or two nulls, and no option."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str | None) for name in entry)


def _pipeline(folder: Path, index: Mapping[str, Any], scheduler: Any) -> Any:
    """A pipeline from its configurations, without tokenizers and weights."""
    models = {**folder_components(folder, device="cpu"), "vae": _configured(folder / "vae", index["vae"])}
    kind = index["kind"]
    names = inspect.signature(kind.__init__).parameters.keys() - {"self"}
    options = {name: None if isinstance(value, str) else value for name, value in index.items() if name in names}
    return kind(**{**options, **models, "scheduler": scheduler})


def _configured(folder: Path, kind: Any) -> Any:
    """A model or scheduler of Diffusers as its configuration has it."""
    try:
        known = getattr(diffusers, kind)
        return known.from_config(known.load_config(folder))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BaseModelError(f"{folder} has no configuration of {kind} that can be read: {error}") from error


def _bytes(modules: Iterable[nn.Module], stored: Mapping[int, str | None], but: Collection[Tensor] = ()) -> int:
    """Of all weights but some; of linear layers that are quantized, about, in the format for the id of their model."""
    found = 0.0
    for module in modules:
        kind = stored[id(module)]
        linear = {id(layer.weight) for layer in module.modules() if type(layer) is nn.Linear} if kind else set()
        for weight in module.parameters():
            if weight in but:
                continue
            found += weight.numel() * BYTES[str(kind)] if id(weight) in linear else weight.nbytes
    return round(found)


def _copied(module: nn.Module, kind: str | None) -> list[Tensor]:
    """Weights of which torchao's layers keep a copy for the backward pass; adapted layers do without."""
    if kind is None or PACKAGES[kind] != "torchao":
        return []
    adapted = {layer.get_base_layer() for layer in krona_layers(module).values()}
    return [layer.weight for layer in module.modules() if type(layer) is nn.Linear and layer not in adapted]


def _forward(pipe: Any, training: TrainingConfig, side: int, texts: int) -> list[Tensor]:
    """A step's forward pass on images of so many pixels a side, and as many texts; all that comes out of it."""
    family, count = family_of(pipe), training.train_batch_size
    latents = torch.empty(count, *family.latent_shape(side, side), dtype=family.dtype)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(training.mixed_precision)
    trained = trained_encoders(pipe, training)
    most = family.TOKENS[1] if family.TOKENS else T5_TOKENS
    with torch.autocast("cpu", half, enabled=half is not None):
        hidden = [_encoded(encoder, texts, most) for encoder in trained]
        example = family.example(count)
        for tensor in example.values():
            tensor.requires_grad_(bool(hidden) and tensor.is_floating_point())
        levels, sizes = torch.zeros(count, dtype=torch.long), torch.empty(count, 6)
        return [family.predict(latents, levels, example, sizes), *hidden]


def _encoded(encoder: Any, texts: int, most: int) -> Tensor:
    """The hidden states of a text encoder for as many tokens as a family reads, or as it has places for."""
    tokens = min(getattr(encoder.config, "max_position_embeddings", most), most)
    hidden: Tensor = encoder(torch.zeros(texts, tokens, dtype=torch.long), output_hidden_states=True)[0]
    return hidden


def _activation_bytes(
    modules: Sequence[Any], copied: Sequence[Tensor], forward: Callable[[], Any], training: TrainingConfig
) -> int:
    """Bytes that a forward pass keeps, and with checkpointing the most that a block keeps while it is recomputed."""
    whole, blocks = SavedTensors(modules, copied), [0]

    def block(function: Any, *inputs: Any) -> Any:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                whole.add(tensor)
        inside = SavedTensors(modules, copied)
        with inside.counting():
            outputs = function(*inputs)
        blocks.append(inside.bytes)
        return outputs

    for module in modules:
        module.train()
        if training.gradient_checkpointing:
            recompute_blocks(module, block)
    with whole.counting():
        forward()
    return whole.bytes + max(blocks)
