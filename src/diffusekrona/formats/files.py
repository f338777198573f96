"""Reading safetensors files with errors for people, and writing files whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterFileError

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a safetensors file. Nothing is unpickled.

    Raises:
        AdapterFileError: the file is missing, unreadable, a pickle, truncated or corrupt.
    """
    if not path.is_file():
        raise AdapterFileError(f"{path} is not a file.")
    try:
        with path.open("rb") as opened:
            start = opened.read(4)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        # torch.save writes a zip archive; older files start with pickle's protocol mark.
        if path.suffix in _PICKLE_SUFFIXES or start == b"PK\x03\x04" or start[:1] == b"\x80":
            raise AdapterFileError(
                f"{path} is a pickle, which can run code when it is read; save the adapter as safetensors."
            ) from error
        raise AdapterFileError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated or damaged, so fetch it again."
        ) from error


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
