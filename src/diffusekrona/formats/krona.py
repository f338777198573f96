"""Our own format: PEFT's folder layout, or one safetensors file that carries the config in its header.

Folder    DIR/adapter_config.json and DIR/adapter_model.safetensors for a single model; DIR/unet/…, DIR/text_encoder/…
          for a pipeline, one such pair per component. Tensors are named `base_model.model.<layer>.krona_A` and
          `….krona_B`, as PEFT names them.
File      NAME.safetensors with tensors named `<component>.<layer>.krona_A`, without the component for a single model.

Both carry, in the header's `krona` entry, `{"version": 1, "components": {component: config}}` as JSON, with ""
for a single model, so a tensor file is never separated from its config. The header wins over `adapter_config.json`,
which is there for PEFT to read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..config import KronAConfig, KronAPeftType
from ..errors import AdapterFileError, ConfigError
from .files import read_safetensors, write_whole

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_HEADER = "krona"
_DIFFUSERS_HEADER = "lora_adapter_metadata"


@dataclass
class SavedAdapter:
    """One component's adapter: its config and its tensors by `<layer>.krona_A` and `<layer>.krona_B`."""

    config: KronAConfig
    tensors: dict[str, Tensor]
    source: Path | None = None


def write(path: Path, adapters: Mapping[str, SavedAdapter]) -> None:
    """Write adapters by component ("" for a single model) to a file if `path` ends in .safetensors, else to a folder.

    Every file is written whole or not at all. Components that the folder held before and that are not in `adapters`
    are removed last.

    Raises:
        OSError: the disk is full or not writable; files already there are as they were.
    """
    if path.suffix == ".safetensors":
        tensors = {_join(part, key): t for part, saved in adapters.items() for key, t in saved.tensors.items()}
        _write_tensors(path, tensors, {part: saved.config for part, saved in adapters.items()})
        return
    for part, saved in adapters.items():
        tensors = {_PEFT_PREFIX + key: tensor for key, tensor in saved.tensors.items()}
        _write_tensors(path / part / WEIGHTS_NAME, tensors, {"": saved.config})
        text = json.dumps(saved.config.to_dict(), indent=2, sort_keys=True) + "\n"
        write_whole(path / part / CONFIG_NAME, partial(_write_text, text))
    for part in _parts(path) - adapters.keys():
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (path / part / name).unlink(missing_ok=True)


def read(path: Path) -> dict[str, SavedAdapter]:
    """Adapters by component ("" for a single model) from a file or folder that `write`, PEFT or Diffusers wrote.

    Raises:
        AdapterFileError: nothing to read, a pickle, a damaged file, a missing or wrong config, another method's adapter.
    """
    if not path.is_dir():
        return _read_file(path)
    parts = _parts(path)
    if parts:
        return {part: _read_part(path / part) for part in sorted(parts)}
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _read_file(files[0])
    found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
    raise AdapterFileError(
        f"{path} holds no {WEIGHTS_NAME}, neither itself nor in a component's folder, and not exactly one other "
        f".safetensors file. It holds: {found}."
    )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], configs: Mapping[str, KronAConfig]) -> None:
    header = {"version": 1, "components": {part: config.to_dict() for part, config in configs.items()}}
    metadata = {"format": "pt", _HEADER: json.dumps(header, sort_keys=True)}
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _parts(folder: Path) -> set[str]:
    if (folder / WEIGHTS_NAME).is_file():
        return {""}
    return {child.parent.name for child in folder.glob(f"*/{WEIGHTS_NAME}")}


def _read_part(folder: Path) -> SavedAdapter:
    path = folder / WEIGHTS_NAME
    tensors, metadata = read_safetensors(path)
    configs = _header_configs(path, metadata) or {"": _config(folder / CONFIG_NAME, _read_json(folder / CONFIG_NAME))}
    if set(configs) != {""}:
        raise AdapterFileError(f"{path} holds the components {sorted(configs)}; a component's folder holds one.")
    return SavedAdapter(configs[""], {key.removeprefix(_PEFT_PREFIX): t for key, t in tensors.items()}, path)


def _read_file(path: Path) -> dict[str, SavedAdapter]:
    if not path.exists():
        raise AdapterFileError(f"{path} does not exist.")
    tensors, metadata = read_safetensors(path)
    configs = _header_configs(path, metadata)
    if not configs:
        raise AdapterFileError(
            f"{path} carries no KronA config in its header, so it was not saved by save_krona; "
            f"a folder with {CONFIG_NAME} beside the tensors would do, too."
        )
    adapters = {part: SavedAdapter(config, {}, path) for part, config in configs.items()}
    for key, tensor in tensors.items():
        part = "" if "" in adapters else key.partition(".")[0]
        if part not in adapters:
            raise AdapterFileError(f"{path} holds {key!r}, but its config names only {sorted(adapters)}.")
        adapters[part].tensors[key.removeprefix(_join(part, "")).removeprefix(_PEFT_PREFIX)] = tensor
    return adapters


def _header_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, KronAConfig]:
    if _HEADER in metadata:
        header = _parse_json(path, metadata[_HEADER])
        components = header.get("components")
        if header.get("version") != 1 or not isinstance(components, dict) or not components:
            raise AdapterFileError(f"{path} has a `krona` header of version {header.get('version')!r}; this reads version 1.")
        return {part: _config(path, values) for part, values in components.items()}
    if _DIFFUSERS_HEADER in metadata:
        return {"": _config(path, _parse_json(path, metadata[_DIFFUSERS_HEADER]))}
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{path} cannot be read ({error}), and the tensors beside it carry no config.") from error
    return _parse_json(path, text)


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterFileError(f"{path} holds a damaged config: {error}.") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path} holds a config that is not a JSON object.")
    return value


def _config(path: Path, values: Any) -> KronAConfig:
    method = values.get("peft_type") if isinstance(values, dict) else None
    if method != KronAPeftType.KRONA:
        raise AdapterFileError(f"{path} holds an adapter of the method {method!r}, not a KronA adapter.")
    try:
        config = KronAConfig.from_peft_type(**values)
    except (ConfigError, TypeError, KeyError) as error:
        raise AdapterFileError(f"{path} holds a config that does not work: {error}") from error
    assert isinstance(config, KronAConfig)
    return config


def _join(part: str, key: str) -> str:
    return f"{part}.{key}" if part else key
