"""Reading safetensors files with errors for people, and writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterFileError

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a safetensors file. Nothing is unpickled.

    Raises:
        AdapterFileError: the file is missing, a pickle, truncated or corrupt.
    """
    if not path.is_file():
        raise AdapterFileError(f"{path} is not a file.")
    if path.suffix in _PICKLE_SUFFIXES or _looks_pickled(path):
        raise AdapterFileError(f"{path} is a pickle, which can run code when it is read; save the adapter as safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterFileError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated or damaged, so fetch it again."
        ) from error


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    # torch.save writes a zip archive; older files start with pickle's protocol mark.
    return start == b"PK\x03\x04" or start[:1] == b"\x80"


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a reader sees the old file or the new one.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files for their owner alone; a saved adapter follows the user's umask, as any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
