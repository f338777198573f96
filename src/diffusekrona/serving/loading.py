"""An adapter of any file, in memory: read once, into one piece of memory where it is like one that was read before."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError
from ..files.formats.krona import HEADER, WEIGHTS_NAME, SavedAdapter, saved_parts
from ..files.read import read_adapters
from ..storage import Header, read_header
from ..tuner.config import KronAConfig
from ..tuner.slots import Contents, Structure
from ..tuner.targets import layer_scale

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


State = tuple[tuple[int, int], ...]
"""What changes when an adapter's file, or one in its folder, is replaced: when each was written, and its bytes."""


def state_of(source: Path) -> State:
    """The state of an adapter's file or folder, without opening anything.

    Raises:
        AdapterFileError: it is not there any more.
    """
    try:
        return tuple((found.st_mtime_ns, found.st_size) for found in map(Path.stat, _files(source)))
    except OSError as error:
        raise AdapterFileError(f"{source} cannot be read: {error}.") from error


def bytes_of(source: Path) -> int:
    """How many bytes of numbers an adapter's files hold, by their sizes and what they say of their headers'.

    Raises:
        AdapterFileError: it is not there any more.
    """
    try:
        return sum(_bytes_of_numbers(path) for path in _files(source))
    except OSError as error:
        raise AdapterFileError(f"{source} cannot be read: {error}.") from error


def _files(source: Path) -> list[Path]:
    return sorted(source.glob("**/*.safetensors")) if source.is_dir() else [source]


def _bytes_of_numbers(path: Path) -> int:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        return max(0, os.fstat(file.fileno()).st_size - 8 - header)


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter in memory, and in no model.

    Attributes:
        structure: which factors it has, and of which shapes.
        contents: these factors, and what else tells it from others of its structure.
        configs: by component; for the first adapter of a structure, that goes into the model in the usual way.
        bytes: of the factors.
    """

    structure: Structure
    contents: Contents
    configs: Mapping[str, KronAConfig]
    bytes: int

    def saved(self) -> dict[str, SavedAdapter]:
        """The adapter as the files' readers give it."""
        found = {part: SavedAdapter(config, {}) for part, config in self.configs.items()}
        for (part, name, _), tensor in zip(self.structure.tensors, self.contents.tensors, strict=True):
            found[part].tensors[name] = tensor
        return found


@dataclass(eq=False)
class _Known:
    """How the numbers lie in files of one header, all that the header says having been checked."""

    adapter: LoadedAdapter
    dtype: torch.dtype
    sizes: list[int]
    shapes: list[tuple[int, ...]]
    order: list[int]
    """For each tensor of the structure, its place in the file."""
    numbers: int = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = sum(self.sizes)


class Loader:
    """Reads adapters for the models of a pipeline.

    Factors keep the dtype of the file where it is that of the base, and are float32 otherwise.

    Args:
        components: the pipeline's models that can be adapted, by name.
        most_known: of how many headers the layout is kept.
    """

    def __init__(self, components: Mapping[str, nn.Module], most_known: int = 64) -> None:
        self._components = components
        weight = next(next(iter(components.values())).parameters())
        self._dtype = weight.dtype
        self.device = torch.device("cpu") if weight.is_meta else weight.device
        self._known: dict[tuple[str | None, str], _Known] = {}
        self._most_known = most_known

    def load(self, source: Path) -> LoadedAdapter:
        """Read an adapter's file or folder.

        Raises:
            AdapterFileError: as `read_adapters`; or it trains whole modules, which all samples of a batch would have.
        """
        path = _single_file(source)
        if path is None:
            return self._by_the_readers(source)
        try:
            with path.open("rb") as file:
                header = read_header(file)
                if header is not None and (known := self._known.get(_key(header))) is not None:
                    size = known.numbers * known.dtype.itemsize
                    if os.fstat(file.fileno()).st_size == header.bytes + size:
                        return self._in_one(path, file, known)
        except OSError as error:
            raise AdapterFileError(f"{path} cannot be read: {error}.") from error
        loaded = self._by_the_readers(source)
        if header is not None and HEADER in header.metadata:
            self._learn(header, loaded)
        return loaded

    def _in_one(self, path: Path, file: Any, known: _Known) -> LoadedAdapter:
        numbers = torch.empty(known.numbers, dtype=known.dtype)
        memory = numbers.view(torch.uint8).numpy().data
        if file.readinto(memory) < len(memory):
            raise AdapterFileError(f"{path} ended while it was read; it is being written, or damaged.")
        if not _all_finite(numbers):
            return self._by_the_readers(path)  # which name what is not finite
        numbers = numbers.to(self.device, self._dtype_for(known.dtype))
        tensors = [part.view(shape) for part, shape in zip(numbers.split(known.sizes), known.shapes, strict=True)]
        like = known.adapter
        contents = like.contents._replace(tensors=[tensors[place] for place in known.order])
        return LoadedAdapter(like.structure, contents, like.configs, numbers.nbytes)

    def _by_the_readers(self, source: Path) -> LoadedAdapter:
        saved = read_adapters(source, self._components)
        for one in saved.values():
            if one.config.modules_to_save:
                raise AdapterFileError(
                    f"{source} trains whole modules ({', '.join(one.config.modules_to_save)}), which every sample of a "
                    "batch would have; load it by itself with load_krona."
                )
        names = [(part, name, tuple(t.shape)) for part, one in saved.items() for name, t in one.tensors.items()]
        structure = Structure(tuple(sorted(names)))
        contents = Contents(
            [self._placed(saved[part].tensors[name]) for part, name, _ in structure.tensors],
            {(part, name): layer_scale(saved[part].config, name) for part, name in structure.layers},
            {part: one.config.layout for part, one in saved.items()},
        )
        configs = {part: one.config for part, one in saved.items()}
        return LoadedAdapter(structure, contents, configs, sum(tensor.nbytes for tensor in contents.tensors))

    def _placed(self, tensor: Tensor) -> Tensor:
        # A copy, since the reader's tensors may be views of a file that someone writes to.
        return tensor.to(self.device, self._dtype_for(tensor.dtype), copy=True)

    def _dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if dtype == self._dtype else torch.float32

    def _learn(self, header: Header, loaded: LoadedAdapter) -> None:
        """Remember how the numbers of a file lie that was just read in the usual way."""
        known = _layout(header.tensors, loaded)
        if known is not None:
            while len(self._known) >= self._most_known:
                del self._known[next(iter(self._known))]
            self._known[_key(header)] = known


def _single_file(source: Path) -> Path | None:
    """The one file of an adapter; None where it has several, or the readers are to say what is wrong."""
    if source.is_file():
        return source
    if source.is_dir() and saved_parts(source) == [""]:
        return source / WEIGHTS_NAME
    return None


def _key(header: Header) -> tuple[str | None, str]:
    # Of the metadata, only this says how the tensors are meant.
    return header.metadata.get(HEADER), header.tensors


def _layout(text: str, loaded: LoadedAdapter) -> _Known | None:
    """How a header says that an adapter's numbers lie; None where that is not of one dtype, gapless, and the same."""
    entries = json.loads("{" + text.removeprefix(","))
    entries = sorted(entries.items(), key=lambda one: one[1]["data_offsets"])
    dtypes = {entry["dtype"] for _, entry in entries}
    dtype = _DTYPES.get(next(iter(dtypes))) if len(dtypes) == 1 else None
    if dtype is None:
        return None
    places, sizes, shapes, end = {}, [], [], 0
    for number, (name, entry) in enumerate(entries):
        start, stop = entry["data_offsets"]
        if start != end:
            return None
        end = stop
        places[name] = number
        sizes.append((stop - start) // dtype.itemsize)
        shapes.append(tuple(entry["shape"]))
    order = [_place(places, part, name) for part, name, _ in loaded.structure.tensors]
    wanted = [shape for _, _, shape in loaded.structure.tensors]
    if None in order or len(order) != len(entries) or [shapes[place] for place in order if place is not None] != wanted:
        return None
    like = LoadedAdapter(loaded.structure, loaded.contents._replace(tensors=[]), loaded.configs, 0)
    return _Known(like, dtype, sizes, shapes, [place for place in order if place is not None])


def _place(places: Mapping[str, int], part: str, name: str) -> int | None:
    """Where a tensor is in a file, by the ways in which we and PEFT name it."""
    return next((places[one] for one in (f"{part}.{name}", name, f"base_model.model.{name}") if one in places), None)


def _all_finite(numbers: Tensor) -> bool:
    """Whether all are finite; False also where their sum is not, which takes a tenth of the time to know."""
    return math.isfinite(numbers.sum(dtype=torch.float32).item())
