"""Tensors that frozen encoders make of images and prompts: computed once, or in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Generic, Literal, TypeVar

from torch import Tensor, nn

from ..errors import AdapterFileError
from ..storage import digest, read_safetensors, safetensors_bytes, write_whole

Keep = Literal["memory", "disk", "none"]
Key = TypeVar("Key")


class Encoded(Generic[Key]):
    """What an encoder makes of each key.

    Args:
        encode: gives the tensors of a key.
        keep: where they stay.
        folder: of the files, for "disk".
        name: of a key's file; it must tell all that the tensors depend on.
    """

    def __init__(
        self, encode: Callable[[Key], Mapping[str, Tensor]], keep: Keep, folder: Path | None, name: Callable[[Key], str]
    ) -> None:
        self._encode, self._keep, self._folder, self._name = encode, keep, folder, name
        self._in_memory: dict[Key, Mapping[str, Tensor]] = {}

    def prepare(self, keys: Iterable[Key]) -> None:
        """Encode what is to be kept and is not there yet."""
        for key in keys:
            if self._keep == "memory":
                self._in_memory[key] = _on_cpu(self._encode(key))
            elif self._keep == "disk" and not self._is_in_file(key):
                tensors = _on_cpu(self._encode(key))
                write_whole({self._file(key): safetensors_bytes(tensors, {"sha256": digest(tensors)})})

    def __getitem__(self, key: Key) -> Mapping[str, Tensor]:
        """The tensors of a key, on the CPU."""
        if self._keep == "memory":
            return self._in_memory[key]
        return read_safetensors(self._file(key))[0] if self._keep == "disk" else _on_cpu(self._encode(key))

    def _file(self, key: Key) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name(key)}.safetensors"

    def _is_in_file(self, key: Key) -> bool:
        """Whether there is a whole file of a key; a damaged one counts as none."""
        try:
            tensors, metadata = read_safetensors(self._file(key))
        except AdapterFileError:
            return False
        return metadata.get("sha256") == digest(tensors)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def fingerprint(modules: Iterable[nn.Module], settings: str = "") -> str:
    """A hash of all weights of frozen modules and of settings, by which files made with others are told apart."""
    weights = {f"{i}.{name}": t for i, module in enumerate(modules) for name, t in module.state_dict().items()}
    return digest(weights, settings)
