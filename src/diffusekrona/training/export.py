"""The adapter of a run's checkpoint, as a file that loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..files.formats.krona import SavedAdapter, write
from ..tuner.config import KronAConfig
from ..tuner.names import DENOISERS, TEXT_ENCODERS, layer_of, without_component
from .checkpoints import Checkpoint, Checkpoints, read_checkpoint

ABOUT_ADAPTER = "the adapter's "
"""Before the names of an adapter's settings in a checkpoint."""


def export_checkpoint(source: Path, target: Path) -> int:
    """Write the adapter of a checkpoint: the averages where the run keeps them, otherwise the factors.

    Args:
        source: a checkpoint, or the folder of a run or of its output, whose newest one is taken.
        target: a file that ends in .safetensors, or a folder.

    Returns:
        the step that it is of.

    Raises:
        CheckpointError: there is none, it is damaged, or it is not of an adapter of ours.
    """
    found = _found(source)
    values = {
        name.removeprefix(ABOUT_ADAPTER): value
        for name, value in found.values["config"].items()
        if name.startswith(ABOUT_ADAPTER)
    }
    if not values:
        raise CheckpointError(f"{found.path} is of a run that trained no adapter of diffusekrona.")
    kind = "ema/" if any(name.startswith("ema/") for name in found.tensors) else "factor/"
    factors = {name.removeprefix(kind): tensor for name, tensor in found.tensors.items() if name.startswith(kind)}
    write(target.expanduser(), {part: _adapter(values, tensors) for part, tensors in _by_component(factors).items()})
    return found.step


def _found(source: Path) -> Checkpoint:
    source = source.expanduser()
    if not source.is_dir():
        return read_checkpoint(source)
    for folder in (source, source / "checkpoints", source / "run" / "checkpoints"):
        if (found := Checkpoints(folder, limit=1).newest()) is not None:
            return found
    raise CheckpointError(f"{source} has no checkpoint, which is called like step-00000500.safetensors.")


def _by_component(factors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by component, "" where they are of a single model."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in factors.items():
        first = name.partition(".")[0]
        part = first if first in (*DENOISERS, *TEXT_ENCODERS) else ""
        parts.setdefault(part, {})[without_component(part, name)] = tensor
    return parts


def _adapter(values: Mapping[str, object], tensors: dict[str, Tensor]) -> SavedAdapter:
    """An adapter whose config names the layers themselves, whatever word was used for them."""
    layers = sorted({layer_of(name) for name in tensors})
    config = KronAConfig.from_peft_type(**{**values, "target_modules": layers, "inference_mode": True})
    assert isinstance(config, KronAConfig)
    return SavedAdapter(config, tensors)
