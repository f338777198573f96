"""The state of a run in files, from which it goes on as if it had never stopped, on the same base."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError, CheckpointError
from ..storage import digest, read_safetensors, safetensors_bytes, write_whole

SAMPLES = 8
"""Numbers that are looked at of each weight."""


def base_identity(pipe: Any) -> str:
    """A hash of a pipeline's scheduler, and of its models: their weights' names, shapes, types, and some numbers.

    It is the same on every device and for every place that a base is loaded from.
    """
    found = hashlib.sha256(type(pipe).__name__.encode())
    chosen = {name: value for name, value in dict(pipe.scheduler.config).items() if not name.startswith("_")}
    found.update(json.dumps(chosen, sort_keys=True, default=str).encode())
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            for name, weight in module.state_dict().items():
                found.update(f"{part}.{name}".encode())
                if isinstance(weight, Tensor):
                    found.update(repr((tuple(weight.shape), weight.dtype)).encode() + _sample(weight))
    return found.hexdigest()[:16]


def _sample(weight: Tensor) -> bytes:
    """Bytes of some numbers of a weight; of quantized ones and of those that are not there, none."""
    if type(weight) is not Tensor or weight.is_meta:
        return b""
    some = weight.flatten()[:: max(1, weight.numel() // SAMPLES)]
    content: bytes = some.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return content


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a run was after a step.

    Attributes:
        step: how many steps were done.
        tensors: factors, the optimizer's state, averages.
        values: all that is no tensor, for JSON.
        path: of the file.
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    path: Path


class Checkpoints:
    """A folder of files `step-00000500.safetensors`, each written whole or not at all, with a checksum.

    Args:
        folder: made when something is saved.
        limit: how many files to keep, the newest.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit = folder, limit

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then remove those beyond the limit, and those of later steps, which are not this run's.

        Raises:
            CheckpointError: the disk is full or the folder not writable; the older ones are as they were.
        """
        text = json.dumps(values)
        path = self.file(step)
        try:
            write_whole({path: safetensors_bytes(tensors, {"run": text, "sha256": digest(tensors, text)})})
        except OSError as error:
            newest = self._files()[-1:]
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written ({error}). "
                + (f"The one before is whole: {newest[0]}." if newest else "There is none before it.")
            ) from error
        files = self._files()
        ours = files[: files.index(path) + 1]
        # Later ones are damaged and were passed over, or are of a run that was begun anew.
        for other in {*files} - {*ours[-self._limit :]}:
            other.unlink(missing_ok=True)
        for leftover in self.folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        return path

    def file(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:08d}.safetensors"

    def check_free(self) -> None:
        """Raise `CheckpointError` if there are checkpoints, which a run that begins anew would replace."""
        if files := self._files():
            raise CheckpointError(
                f"{self.folder} has checkpoints of an earlier run, up to {files[-1].stem}: go on from there (resume), "
                "begin anew in their place (overwrite), or choose another folder."
            )

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; a damaged one is passed over with a warning. None if there is none."""
        for path in reversed(self._files()):
            try:
                return read_checkpoint(path)
            except CheckpointError as error:
                _log.warning("%s The one before it is tried.", error)
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's content.

    Raises:
        CheckpointError: it is missing, damaged, or none.
    """
    try:
        tensors, metadata = read_safetensors(path)
        text = metadata["run"]
        whole = digest(tensors, text) == metadata["sha256"]
    except (AdapterFileError, KeyError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a run, or a damaged one ({error}).") from error
    if not whole:
        raise CheckpointError(f"The checkpoint {path} is damaged: its checksum is another.")
    values = json.loads(text)
    return Checkpoint(values["step"], tensors, values, path)
