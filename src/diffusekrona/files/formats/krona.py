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

from ...errors import AdapterFileError, ConfigError
from ...storage import TensorFile, safetensors_bytes, write_whole
from ...tuner import model  # noqa: F401  # which enters our method in PEFT's tables, that configs are made by
from ...tuner.config import KronAConfig, KronAPeftType
from ...tuner.names import (
    DENOISERS,
    PEFT_PREFIX,
    TEXT_ENCODERS,
    in_component,
    layer_of,
    unwrapped_name,
    without_component,
    without_peft_prefix,
)
from ...tuner.patterns import check_matching
from .scales import HEADER as _DIFFUSERS_HEADER
from .scales import MOST_COMPONENTS

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
HEADER = "krona"


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
        tensors = {in_component(part, key): t for part, saved in adapters.items() for key, t in saved.tensors.items()}
        write_whole({path: _content(tensors, {part: saved.config for part, saved in adapters.items()})})
        return
    weights, configs = {}, {}
    for part, saved in adapters.items():
        tensors = {PEFT_PREFIX + key: tensor for key, tensor in saved.tensors.items()}
        weights[path / part / WEIGHTS_NAME] = _content(tensors, {"": saved.config})
        text = json.dumps(saved.config.to_dict(), indent=2, sort_keys=True) + "\n"
        configs[path / part / CONFIG_NAME] = text.encode()
    write_whole({**weights, **configs})
    for part in saved_parts(path):
        if part not in adapters:
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                (path / part / name).unlink(missing_ok=True)


def saved_parts(folder: Path) -> list[str]:
    """The components, "" for a single model, of which a folder holds an adapter in PEFT's layout."""
    names = ("", *DENOISERS, *TEXT_ENCODERS)
    return [part for part in names if (folder / part / WEIGHTS_NAME).is_file()]


def read(files: Mapping[str, TensorFile]) -> dict[str, SavedAdapter]:
    """Adapters by component ("" for a single model) from what `write`, PEFT or Diffusers wrote.

    Args:
        files: by component, or one as "" that names its components itself.

    Raises:
        AdapterFileError: a missing or wrong config, or an adapter of another method.
    """
    if "" in files:
        return _adapters(files[""])
    return {part: _only_adapter(file) for part, file in files.items()}


def header_of(configs: Mapping[str, KronAConfig]) -> dict[str, str]:
    """The header entry of a file of ours: the components' configs, "" for a single model."""
    header = {"version": 1, "components": {part: config.to_dict() for part, config in configs.items()}}
    return {HEADER: json.dumps(header, sort_keys=True)}


def _content(tensors: Mapping[str, Tensor], configs: Mapping[str, KronAConfig]) -> bytes:
    return safetensors_bytes(tensors, header_of(configs))


def _only_adapter(file: TensorFile) -> SavedAdapter:
    adapters = _adapters(file)
    if set(adapters) != {""}:
        raise AdapterFileError(
            f"{file.path} holds the components {sorted(adapters)}; a component's folder holds one, without a name."
        )
    return adapters[""]


def _adapters(file: TensorFile) -> dict[str, SavedAdapter]:
    configs = _header_configs(file.path, file.metadata) or _config_beside(file.path)
    adapters = {part: SavedAdapter(config, {}, file.path) for part, config in configs.items()}
    for key, tensor in file.tensors.items():
        part = "" if "" in adapters else key.partition(".")[0]
        if part not in adapters:
            raise AdapterFileError(f"{file.path} holds {key!r}, but its config names only {sorted(adapters)}.")
        name = unwrapped_name(without_peft_prefix(without_component(part, key)))
        adapters[part].tensors[name] = tensor
    for saved in adapters.values():
        _check_matching(saved)
    return adapters


def _check_matching(saved: SavedAdapter) -> None:
    config, names = saved.config, {layer_of(name) for name in saved.tensors}
    try:
        check_matching(names, endings=[*config.factor_pattern, *config.alpha_pattern, *config.terms_pattern])
    except ConfigError as error:
        raise AdapterFileError(f"{saved.source} holds a config that does not work: {error}") from error


def _header_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, KronAConfig]:
    if HEADER in metadata:
        header = _parse_json(path, metadata[HEADER])
        components = header.get("components")
        if header.get("version") != 1:
            raise AdapterFileError(
                f"{path} has a `krona` header of version {header.get('version')!r}; this reads version 1."
            )
        if not isinstance(components, dict) or not components:
            raise AdapterFileError(f"{path} has a `krona` header that names no components.")
        if len(components) > MOST_COMPONENTS:
            raise AdapterFileError(
                f"{path} has a `krona` header for {len(components):,} components, and {MOST_COMPONENTS} is the most."
            )
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
