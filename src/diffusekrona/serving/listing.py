"""Which adapters there are, by name: those of a folder, or repositories of the hub. None is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from ..errors import AdapterNameError, KronAError
from ..storage import resolve

_FILE = ".safetensors"


class Listing:
    """The names of adapters, and where each is. A name is looked up, never made a path of.

    In a folder, an adapter is a `.safetensors` file or a folder, and its name is that without the ending. What is added
    or removed later is seen: one look at the folder's own date tells. Names that begin with a dot are none.

    Args:
        adapters: the folder, or ids of hub repositories.

    Raises:
        KronAError: it is no folder, or no id is given.
    """

    def __init__(self, adapters: str | PathLike[str] | Iterable[str]) -> None:
        self._folder: Path | None = None
        self._found: dict[str, list[str]] = {}
        self._seen = -1
        if isinstance(adapters, (str, PathLike)):
            self._folder = Path(adapters).expanduser()
            self._look()
        else:
            self._found = {name: [name] for name in adapters}
            if not self._found:
                raise KronAError("There are no adapters: give a folder of them, or ids of hub repositories.")

    def names(self) -> list[str]:
        """All names, sorted."""
        self._look()
        return sorted(self._found)

    def __contains__(self, name: object) -> bool:
        self._look()
        return name in self._found

    def __len__(self) -> int:
        self._look()
        return len(self._found)

    def source(self, name: str) -> Path:
        """The file or folder of an adapter; a hub's repository is fetched if it is not in the local cache.

        Raises:
            AdapterNameError: there is none of this name, or there are two.
            AdapterFileError: the hub does not give it.
        """
        self._look()
        entries = self._found.get(name, [])
        if len(entries) > 1:
            raise AdapterNameError(f"Two adapters are named {name!r}: {' and '.join(sorted(entries))}. Rename one.")
        if not entries:
            raise AdapterNameError(f"There is no adapter named {name!r}.")
        if self._folder is not None:
            return self._folder / entries[0]
        found = resolve(entries[0])
        self._found[name] = [str(found)]  # so that the hub is asked once
        return found

    def _look(self) -> None:
        """Read the folder, unless nothing was added or removed since."""
        if self._folder is None:
            return
        try:
            changed = self._folder.stat().st_mtime_ns
            if changed == self._seen:
                return
            found: dict[str, list[str]] = {}
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if (name := _name(entry)) is not None:
                        found.setdefault(name, []).append(entry.name)
        except OSError as error:
            raise KronAError(f"The adapters' folder {self._folder} cannot be read: {error}.") from error
        self._found, self._seen = found, changed


def _name(entry: os.DirEntry[str]) -> str | None:
    if entry.name.startswith("."):
        return None
    if entry.name.endswith(_FILE):
        return entry.name.removesuffix(_FILE)
    return entry.name if entry.is_dir() else None
