"""Files: safetensors read with errors for people, written whole or not at all; and repositories of the hub, fetched."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from .errors import AdapterFileError

LARGEST_HEADER = 32 << 20
"""Bytes of a header that are read; a large model's or adapter's takes 5 MB. safetensors itself reads 100 MB."""

MOST_TENSORS = 100_000
"""Tensors in a file; a large model has 10,000."""

LONGEST_NAME = 1024
"""Characters of a tensor's name; a deep model's have 150."""

MOST_DIMENSIONS = 8
"""Of a tensor; a weight has 5 at most."""

_LARGEST_SIZE = 2**63 - 1  # what torch can count
_NO_NUMBERS = {"F4", "F6_E2M3", "F6_E3M2", "C64"}
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class TensorFile(NamedTuple):
    """What a safetensors file holds: its tensors by name, and its header's metadata."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a safetensors file. Nothing is unpickled.

    Raises:
        AdapterFileError: the file is missing, unreadable, a pickle, truncated or corrupt; its header is beyond the
            limits above, or names something twice; or it has tensors of a dtype without a way to float32.
    """
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            dtype = file.get_slice(name).get_dtype()
            if dtype in _NO_NUMBERS:
                raise AdapterFileError(
                    f"{path} holds {name} as {dtype}, which cannot be read here; save it as F16 or F32."
                )
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of a safetensors file's tensors, and its header metadata, without reading the tensors.

    Raises:
        AdapterFileError: as in `read_safetensors`, dtypes aside.
    """
    with open_safetensors(path) as file:
        return list(file.keys()), dict(file.metadata() or {})


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened by safetensors after our own look at its header; nothing else has been read.

    Raises:
        AdapterFileError: as in `read_safetensors`, dtypes aside; and for what safetensors raises while it is open.
    """
    if not path.is_file():
        raise AdapterFileError(f"{path} is not a file.")
    try:
        with path.open("rb") as raw:
            start = raw.read(8)
            size = int.from_bytes(start, "little")
            too_large = LARGEST_HEADER < size <= os.fstat(raw.fileno()).st_size - 8
            # A short file's header is whatever is there: safetensors says what is wrong with it.
            text = b"" if too_large or len(start) < 8 else raw.read(min(size, LARGEST_HEADER))
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error
    if too_large:
        raise AdapterFileError(
            f"{path} has a header of {size:,} bytes, and headers of up to {LARGEST_HEADER:,} are read here; it is no "
            "adapter or model, or was made to do harm."
        )
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterFileError(_not_whole(path, start, error)) from error
    _check_header(text, path)
    try:
        with file:
            yield file
    except SafetensorError as error:
        raise AdapterFileError(_not_whole(path, start, error)) from error


class Header(NamedTuple):
    """What stands before the numbers of a safetensors file.

    Attributes:
        metadata: its metadata.
        tensors: the text that names the tensors, which two files have in common whose tensors lie alike.
        bytes: of it all; the numbers begin there.
    """

    metadata: dict[str, str]
    tensors: str
    bytes: int


_METADATA_FIRST = '{"__metadata__":'


def read_header(file: BinaryIO) -> Header | None:
    """The header of an opened file, with metadata first, as safetensors and we write it; None where it is otherwise.

    Nothing of it is checked: compare `tensors` with that of a file that was read as a whole.
    """
    size = int.from_bytes(file.read(8), "little")
    text = file.read(size) if size <= LARGEST_HEADER else b""
    try:
        content = text.decode()
        if len(text) < size or not content.startswith(_METADATA_FIRST):
            return None
        metadata, end = json.JSONDecoder().raw_decode(content, len(_METADATA_FIRST))
    except (ValueError, RecursionError):
        return None
    return Header(metadata, content[end:], 8 + size) if isinstance(metadata, dict) else None


def _not_whole(path: Path, start: bytes, error: Exception) -> str:
    # torch.save writes a zip archive; older files start with pickle's protocol mark.
    if path.suffix in _PICKLE_SUFFIXES or start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return f"{path} is a pickle, which can run code when it is read; save the adapter as safetensors."
    return f"{path} is not a complete safetensors file ({error}); it may be truncated or damaged, so fetch it again."


def _check_header(text: bytes, path: Path) -> None:
    """Raise `AdapterFileError` for what safetensors takes in a header and the readers should not meet."""
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        tensors = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        problem = _problem(tensors)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        problem = str(error)
    if problem:
        raise AdapterFileError(
            f"{path} has a header that is not read here: {problem}. The file is damaged or made to do harm."
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"it names {_short(twice)} twice")
    return found


def _problem(shapes: Mapping[str, list[int]]) -> str:
    if len(shapes) > MOST_TENSORS:
        return f"it names {len(shapes):,} tensors, and {MOST_TENSORS:,} is the most"
    for name, shape in shapes.items():
        if len(name) > LONGEST_NAME:
            return f"the name {_short(name)} has {len(name):,} characters, and {LONGEST_NAME:,} is the most"
        if len(shape) > MOST_DIMENSIONS:
            return f"{_short(name)} has {len(shape):,} dimensions, and {MOST_DIMENSIONS} is the most"
        if math.prod(size for size in shape if size) > _LARGEST_SIZE:
            return f"{_short(name)} has the shape {shape}, whose sizes are too large"
    return ""


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else f"{name[:100]}…")


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with this header metadata. Equal contents give equal bytes."""
    content = safetensors.save(_on_cpu(tensors))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    # safetensors writes several entries in random order, so the header is written anew.
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def data_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what follows the header in a file of these tensors, by which kohya's scripts know a file."""
    content = safetensors.save(_on_cpu(tensors))
    return hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of tensors, with their names, dtypes and shapes, and of a text."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(_on_cpu(tensors).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Write each file under a temporary name beside its path, then rename all: readers see old or new files.

    Nothing but renames happens between the first path's change and the last one's, so a disk that fills up
    leaves all as they were. A killed process may leave a temporary file `.NAME.….tmp`; nothing reads it.

    Raises:
        OSError: the disk is full or the folder is not writable; every path is as it was.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder, so no file of that name can be written.")
            staged[path] = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            with staged[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(path: str | PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """A local path to what `path` names: itself if it exists, else the hub repository of that id.

    Only .safetensors and .json files are fetched.

    Raises:
        AdapterFileError: it does not exist here, and is no hub id or could not be fetched.
    """
    name = fspath(path)
    local = Path(name).expanduser()
    if local.exists():
        return local
    if not _REPOSITORY.fullmatch(name) or local.suffix == ".safetensors":
        raise AdapterFileError(f"{name} does not exist.")
    patterns = ["*.safetensors", "*.json"]
    try:
        folder = snapshot_download(name, revision=revision, token=token, allow_patterns=patterns)
    except Exception as error:
        raise AdapterFileError(
            f"{name} does not exist here, and could not be fetched from the hub as a repository of that name "
            f"({type(error).__name__}: {error})."
        ) from error
    return Path(folder)
