"""A denoiser whose frozen blocks wait elsewhere, and come one by one, forwards and backwards.

Diffusers' group offloading is not for training: what it empties after the forward pass, the backward pass finds empty.
Here, what autograd saves of a frozen weight is its name, and the block comes again when that is asked for.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import TrainingConfigError
from .config import Offload

_MOSTLY = 0.8
"""Share of a block's weights from which on the lists of blocks within it are what is moved."""

_CHUNK = 1 << 24


@contextmanager
def offloaded(
    denoiser: nn.Module, trained: Iterable[nn.Parameter], device: torch.device, how: Offload, *, copies: bool = False
) -> Iterator[None]:
    """Let a denoiser's frozen weights wait elsewhere, but for those of the block that is at work.

    What is in no block, and what is trained, is on the device. Afterwards, the frozen weights of blocks are in CPU
    memory, or still in their files, from where the system fetches what is read.

    Args:
        denoiser: on the CPU.
        trained: its parameters that are trained.
        device: that computes.
        how: "blocks" for weights in CPU memory; "all" for weights in files: the base's own where these have the very
            numbers, or else temporary ones.
        copies: bring copies also where the device is the CPU, as for another device.

    Raises:
        TrainingConfigError: the weights are quantized or offloaded already.
    """
    excluded = set(trained)
    blocks = [_frozen(block, excluded) for block in blocks_of(denoiser)]
    shared = Counter(weight for block in blocks for weight in block)
    blocks = [[weight for weight in block if shared[weight] == 1] for block in blocks]
    _check(denoiser, blocks)
    waiting = {weight for block in blocks for weight in block}
    with ExitStack() as stack:
        if how == "all":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            for number, block in enumerate(blocks):
                _to_files(block, folder / f"block-{number}.safetensors")
        for part in denoiser.modules():
            for weight in part.parameters(recurse=False):
                if weight not in waiting:
                    weight.data = weight.data.to(device)
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(device))
        stage = _Stage(blocks, device, copies or device.type != "cpu", how == "all")
        stack.callback(stage.clear)
        for number, module in enumerate(blocks_of(denoiser)):
            handle = module.register_forward_pre_hook(lambda *_, number=number: stage.enter(number))
            stack.callback(handle.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(stage.name, stage.named))
        yield


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of a model's lists of modules; of those that are mostly such lists themselves, the members' own."""
    found: list[nn.Module] = []
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            found += blocks_of(child)
            continue
        for block in child:
            inner = blocks_of(block)
            mostly = sum(map(_size, inner)) >= _MOSTLY * _size(block)
            found += inner if inner and mostly else [block]
    return [block for block in found if _size(block)]


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _frozen(block: nn.Module, trained: set[nn.Parameter]) -> list[nn.Parameter]:
    return [weight for weight in block.parameters() if weight not in trained]


def _check(denoiser: nn.Module, blocks: Sequence[Sequence[nn.Parameter]]) -> None:
    if not any(blocks):
        raise TrainingConfigError("offload is given, but the denoiser has no lists of blocks with frozen weights.")
    for name, weight in denoiser.named_parameters():
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
            kind = "offloaded already" if weight.is_meta else f"quantized, a {type(weight).__name__} of {weight.dtype}"
            raise TrainingConfigError(
                f"offload cannot move the weight {name}, which is {kind}: leave out quantize or offload."
            )


class _Named(NamedTuple):
    """What is kept of a frozen weight, or of a view of it, for the backward pass."""

    block: int
    weight: nn.Parameter
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Stage:
    """Where at most one block's weights are at work.

    Args:
        blocks: the frozen weights of each, where they wait.
        device: that computes.
        copies: whether weights are copied to the device, or used where they are.
        in_files: whether what waits takes no memory.
    """

    def __init__(
        self, blocks: Sequence[Sequence[nn.Parameter]], device: torch.device, copies: bool, in_files: bool
    ) -> None:
        self._blocks, self._device, self._copies, self._in_files = blocks, device, copies, in_files
        self._homes = {weight: weight.data for block in blocks for weight in block}
        self._here: int | None = None
        self._pointers: dict[int, nn.Parameter] = {}

    def enter(self, number: int) -> None:
        """Bring a block's weights, and let go of those of others."""
        if number == self._here:
            return
        self.clear()
        self._here = number
        for weight in self._blocks[number]:
            if self._copies:
                weight.data = self._homes[weight].to(self._device, copy=True)
            self._pointers[weight.untyped_storage().data_ptr()] = weight

    def clear(self) -> None:
        """Let all weights wait where they did."""
        for block in self._blocks:
            for weight in block:
                if weight.data_ptr() != self._homes[weight].data_ptr():  # also where a whole model was moved
                    weight.data = self._homes[weight]
        if self._in_files and self._here is not None:
            for weight in self._blocks[self._here]:
                _drop(self._homes[weight])
        self._here = None
        self._pointers.clear()

    def name(self, tensor: Tensor) -> Tensor | _Named:
        """What to keep of a tensor that the backward pass needs."""
        weight = self._pointers.get(tensor.untyped_storage().data_ptr()) if type(tensor) in _PLAIN else None
        if weight is None or self._here is None or tensor.dtype != weight.dtype:
            return tensor
        return _Named(self._here, weight, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def named(self, kept: Tensor | _Named) -> Tensor:
        """The tensor again."""
        if not isinstance(kept, _Named):
            return kept
        self.enter(kept.block)
        return kept.weight.data.as_strided(kept.size, kept.stride, kept.offset)


_PLAIN = (Tensor, nn.Parameter)


# Files


def _to_files(block: Sequence[nn.Parameter], path: Path) -> None:
    """Let weights be what a file has, mapped into memory: the file that they were loaded from, or else a new one."""
    maps = _maps()
    others = [weight for weight in block if not _is_of_file(weight.data, maps)]
    if others:
        save_file({str(number): weight.data.contiguous() for number, weight in enumerate(others)}, path)
        with safe_open(path, framework="pt") as file:
            for number, weight in enumerate(others):
                weight.data = file.get_tensor(str(number))
    for weight in block:
        _drop(weight.data)


class _Map(NamedTuple):
    """A part of a file that is mapped into memory: addresses, the place in the file, the file."""

    start: int
    end: int
    offset: int
    path: str


def _maps() -> list[_Map]:
    """Of this process, where the system tells."""
    found = []
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        addresses, _, offset, _, inode, *path = line.split(maxsplit=5)
        if path and inode != "0":
            start, end = (int(text, 16) for text in addresses.split("-"))
            found.append(_Map(start, end, int(offset, 16), path[0]))
    return found


def _is_of_file(tensor: Tensor, maps: Sequence[_Map]) -> bool:
    """Whether a tensor lies in a map of a file and its numbers are the file's, not written over in memory."""
    start, size = tensor.data_ptr(), tensor.nbytes
    place = next((one for one in maps if one.start <= start and start + size <= one.end), None)
    if place is None or not tensor.is_contiguous() or tensor.device.type != "cpu":
        return False
    numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    try:
        with open(place.path, "rb", buffering=0) as file:
            file.seek(place.offset + start - place.start)
            for first in range(0, size, _CHUNK):
                part = numbers[first : first + _CHUNK]
                if file.read(len(part)) != part.tobytes():
                    return False
                _drop_pages(start + first, len(part))
    except OSError:
        return False
    return True


def _drop(tensor: Tensor) -> None:
    """Let go of the memory that holds what is in a file all the same."""
    _drop_pages(tensor.data_ptr(), tensor.nbytes)


def _drop_pages(start: int, size: int) -> None:
    """Drop whole pages of memory, which are as they are in a file; elsewhere than on Linux, the system has to see."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
