"""Files: safetensors read with errors for people, written whole or not at all; and repositories of the hub, fetched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from .errors import AdapterFileError

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class TensorFile(NamedTuple):
    """What a safetensors file holds: its tensors by name, and its header's metadata."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a safetensors file. Nothing is unpickled.

    Raises:
        AdapterFileError: the file is missing, unreadable, a pickle, truncated or corrupt.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of a safetensors file's tensors, and its header metadata, without reading the tensors.

    Raises:
        AdapterFileError: as in `read_safetensors`.
    """
    with _opened(path) as file:
        return list(file.keys()), dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise AdapterFileError(f"{path} is not a file.")
    try:
        with path.open("rb") as opened:
            start = opened.read(4)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        # torch.save writes a zip archive; older files start with pickle's protocol mark.
        if path.suffix in _PICKLE_SUFFIXES or start == b"PK\x03\x04" or start[:1] == b"\x80":
            raise AdapterFileError(
                f"{path} is a pickle, which can run code when it is read; save the adapter as safetensors."
            ) from error
        raise AdapterFileError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated or damaged, so fetch it again."
        ) from error


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
