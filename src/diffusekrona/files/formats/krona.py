"""Our own format: PEFT's folder layout, or one safetensors file that carries the config in its header.

Folder    DIR/adapter_config.json and DIR/adapter_model.safetensors for a single model; for a pipeline one
          such pair per component, in DIR/unet, DIR/text_encoder and so on. Tensors are named, as PEFT names
          them, `base_model.model.<layer>.krona_A` and `….krona_B`.
File      NAME.safetensors with tensors named `<component>.<layer>.krona_A`, or for a single model
          `<layer>.krona_A`.

Both carry, in the header's `krona` entry, `{"version": 1, "components": {component: config}}` as JSON, with
"" for a single model and in a folder, so a tensor file is never separated from its config. The header wins
over `adapter_config.json`, which is there for PEFT to read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import AdapterFileError
from ...storage import read_names, read_safetensors, safetensors_bytes, write_whole
from ...tuner.config import KronAConfig, KronAPeftType

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

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
    """Write adapters by component ("" for one model): to a file if `path` ends in .safetensors, or a folder.

    Every file is written whole or not at all. Components that the folder held before and that are not in
    `adapters` are removed last. Equal adapters give equal bytes.

    Raises:
        OSError: the disk is full or not writable; files already there are as they were.
    """
    if path.suffix == ".safetensors":
        tensors = {_join(part, key): t for part, saved in adapters.items() for key, t in saved.tensors.items()}
        write_whole({path: _content(tensors, {part: saved.config for part, saved in adapters.items()})})
        return
    weights, configs = {}, {}
    for part, saved in adapters.items():
        tensors = {_PEFT_PREFIX + key: tensor for key, tensor in saved.tensors.items()}
        weights[path / part / WEIGHTS_NAME] = _content(tensors, {"": saved.config})
        text = json.dumps(saved.config.to_dict(), indent=2, sort_keys=True) + "\n"
        configs[path / part / CONFIG_NAME] = text.encode()
    write_whole({**weights, **configs})
    for part in _parts(path):
        if part not in adapters:
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                (path / part / name).unlink(missing_ok=True)


def read(path: Path) -> dict[str, SavedAdapter]:
    """Adapters by component ("" for a single model) from a file or folder of `write`, PEFT or Diffusers.

    Raises:
        AdapterFileError: nothing to read, a pickle, a damaged file, a missing or wrong config, or an adapter
            of another method.
    """
    if not path.is_dir():
        return _read_file(path)
    parts = _parts(path)
    if "" in parts:
        return _read_file(path / WEIGHTS_NAME)
    if parts:
        return {part: _read_part(path / part / WEIGHTS_NAME) for part in parts}
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _read_file(files[0])
    found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
    raise AdapterFileError(
        f"{path} holds no {WEIGHTS_NAME}, neither itself nor in a component's folder, and not exactly one "
        f"other .safetensors file. It holds: {found}."
    )


def foreign_files(path: Path) -> dict[str, Path]:
    """Other programs' files at a path, by component, "" for one that names its components itself; none if it is ours.

    A folder may hold one file, or PEFT's folder for each component. What cannot be read is left to `read` to report.
    """
    if path.is_dir():
        parts = _parts(path)
        files = {part: path / part / WEIGHTS_NAME for part in (parts if "" not in parts else [""])}
        found = sorted(path.glob("*.safetensors"))
        files = files or ({"": found[0]} if len(found) == 1 else {})
    else:
        files = {"": path}
    try:
        return {} if any(map(_is_ours, files.values())) else files
    except AdapterFileError:
        return {}


def _is_ours(path: Path) -> bool:
    names, metadata = read_names(path)
    return _HEADER in metadata or any(".krona_" in name for name in names)


def header_of(configs: Mapping[str, KronAConfig]) -> dict[str, str]:
    """The header entry of a file of ours: the components' configs, "" for a single model."""
    header = {"version": 1, "components": {part: config.to_dict() for part, config in configs.items()}}
    return {_HEADER: json.dumps(header, sort_keys=True)}


def _content(tensors: Mapping[str, Tensor], configs: Mapping[str, KronAConfig]) -> bytes:
    return safetensors_bytes(tensors, header_of(configs))


def _parts(folder: Path) -> list[str]:
    names = ("", *DENOISERS, *TEXT_ENCODERS)
    return [part for part in names if (folder / part / WEIGHTS_NAME).is_file()]


def _read_part(path: Path) -> SavedAdapter:
    adapters = _read_file(path)
    if set(adapters) != {""}:
        raise AdapterFileError(
            f"{path} holds the components {sorted(adapters)}; a component's folder holds one, without a name."
        )
    return adapters[""]


def _read_file(path: Path) -> dict[str, SavedAdapter]:
    if not path.exists():
        raise AdapterFileError(f"{path} does not exist.")
    tensors, metadata = read_safetensors(path)
    configs = _header_configs(path, metadata) or _config_beside(path)
    adapters = {part: SavedAdapter(config, {}, path) for part, config in configs.items()}
    for key, tensor in tensors.items():
        part = "" if "" in adapters else key.partition(".")[0]
        if part not in adapters:
            raise AdapterFileError(f"{path} holds {key!r}, but its config names only {sorted(adapters)}.")
        adapters[part].tensors[_layer_key(key.removeprefix(_join(part, "")))] = tensor
    return adapters


def _header_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, KronAConfig]:
    if _HEADER in metadata:
        header = _parse_json(path, metadata[_HEADER])
        components = header.get("components")
        if header.get("version") != 1:
            raise AdapterFileError(
                f"{path} has a `krona` header of version {header.get('version')!r}; this reads version 1."
            )
        if not isinstance(components, dict) or not components:
            raise AdapterFileError(f"{path} has a `krona` header that names no components.")
        return {part: _config(path, values) for part, values in components.items()}
    if _DIFFUSERS_HEADER in metadata:
        return {"": _config(path, _parse_json(path, metadata[_DIFFUSERS_HEADER]))}
    return {}


def _config_beside(path: Path) -> dict[str, KronAConfig]:
    beside = path.with_name(CONFIG_NAME)
    if not beside.is_file():
        raise AdapterFileError(
            f"{path} carries no KronA config, neither in its header nor in an {CONFIG_NAME} beside it, so "
            "neither save_krona nor PEFT saved it as a KronA adapter."
        )
    try:
        text = beside.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{beside} cannot be read: {error}.") from error
    return {"": _config(beside, _parse_json(beside, text))}


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} holds a damaged config: {error}.") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path} holds a config that is not a JSON object.")
    return value


def _config(path: Path, values: Any) -> KronAConfig:
    method = values.get("peft_type") if isinstance(values, dict) else None
    if method != KronAPeftType.KRONA:
        raise AdapterFileError(
            f"{path} holds {f'an adapter of the method {method}' if method else 'a config'}, "
            "which is not a KronA adapter's."
        )
    try:
        config = KronAConfig.from_peft_type(**values)
    except (TypeError, ValueError, KeyError) as error:
        raise AdapterFileError(f"{path} holds a config that does not work: {error}") from error
    assert isinstance(config, KronAConfig)
    return config


def _layer_key(key: str) -> str:
    """A tensor's name without PEFT's prefix, and as if no other adapter had been around its layer."""
    return key.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")


def _join(part: str, key: str) -> str:
    return f"{part}.{key}" if part else key
