"""Where a saved adapter is: a local path as it is, or a repository of the Hugging Face hub, fetched."""

from __future__ import annotations

import re
from os import PathLike, fspath
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import AdapterFileError

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
