"""Other programs' adapter files: which method each layer holds, told by the names of its tensors.

A tensor is named by its layer and a part, such as `lora_unet_mid_block_attentions_0_proj_in.lokr_w1`. Which module of
a model a layer's name stands for is not a matter of the file: see `layouts.names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from ...errors import AdapterFileError
from ...storage import TensorFile
from . import full, loha, lokr, lora, reference
from .krona import CONFIG_NAME, WEIGHTS_NAME
from .scales import HEADER, Scales, from_header
from .updates import LayerTensors, Update

_PROCESSOR = "processor"
_READERS: dict[str, Callable[[LayerTensors], Update]] = {
    "lokr": lokr.read,
    "lora": lora.read,
    "loha": loha.read,
    "full": full.read,
    "reference": reference.read,
}
_PARTS: dict[str, dict[str, str]] = {
    "lokr": lokr.PARTS,
    "lora": lora.PARTS,
    _PROCESSOR: lora.PROCESSOR_PARTS,
    "loha": loha.PARTS,
    "full": full.PARTS,
    "": {
        ".alpha": "alpha",
        ".dora_scale": "dora_scale",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
        ".lora_magnitude_vector.default.weight": "magnitude",
    },
}
_ENDINGS = {ending: (kind, part) for kind, parts in _PARTS.items() for ending, part in parts.items()}


class _Layer(NamedTuple):
    """One layer's tensors by part, and the methods that their names belong to."""

    kinds: set[str]
    parts: dict[str, Tensor]


def read(file: TensorFile) -> dict[str, Update]:
    """Every layer's update in another program's file, by the layer's name as the file writes it.

    For a PEFT folder's `adapter_model.safetensors`, the scales come from the `adapter_config.json` beside it.

    Raises:
        AdapterFileError: the file holds what `parse` does not take.
    """
    metadata, beside = file.metadata, file.path.with_name(CONFIG_NAME)
    if file.path.name == WEIGHTS_NAME and HEADER not in metadata and beside.is_file():
        try:
            metadata = {**metadata, HEADER: beside.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterFileError(f"{beside} cannot be read: {error}.") from error
    return parse(file.tensors, metadata, str(file.path))


def parse(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, source: str = "The file"
) -> dict[str, Update]:
    """Every layer's update, by the layer's name as the file writes it. A file may mix methods from layer to layer.

    Args:
        tensors: the file's tensors by name.
        metadata: the file's header, which may hold PEFT's config.
        source: what to call the file in errors.

    Raises:
        AdapterFileError: there is nothing in it, or a tensor of a kind that is not known here; or a layer whose
            tensors are incomplete, not finite or do not fit each other.
    """
    scales = from_header(metadata, source) if metadata and metadata.get(HEADER) else None
    return {name: _update(name, kind, layer, scales, source) for name, kind, layer in _layers(tensors, source)}


def _update(name: str, kind: str, layer: _Layer, scales: Scales | None, source: str) -> Update:
    return _READERS[kind](LayerTensors(f"{source}: the layer {name}", name, layer.parts, scales))


def _layers(tensors: Mapping[str, Tensor], source: str) -> list[tuple[str, str, _Layer]]:
    """Name, method and tensors of each layer, in the file's order."""
    layers = _grouped(tensors, source)
    processor = "reference" if any(map(_is_reference, layers.values())) else "lora"
    found = []
    for name, layer in layers.items():
        kinds = layer.kinds - {""}
        if len(kinds) != 1:
            raise AdapterFileError(
                f"{source}: the layer {name} holds only {', '.join(sorted(layer.parts))}, which is "
                + (f"of several methods at once ({', '.join(sorted(kinds))})." if kinds else "no update by itself.")
            )
        kind = kinds.pop()
        found.append((name, processor if kind == _PROCESSOR else kind, layer))
    return found


def _grouped(tensors: Mapping[str, Tensor], source: str) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
        if ending is None:
            unknown.append(key)
            continue
        kind, part = _ENDINGS[ending]
        layer = layers.setdefault(key.removesuffix(ending), _Layer(set(), {}))
        if part in layer.parts:
            raise AdapterFileError(f"{source}: {key} is the second tensor for {part} of its layer; one is expected.")
        layer.kinds.add(kind)
        layer.parts[part] = tensor
    if unknown:
        raise AdapterFileError(_not_known(unknown, len(tensors), source))
    if not layers:
        raise AdapterFileError(f"{source} holds no tensors.")
    return layers


def _not_known(keys: Iterable[str], of: int, source: str) -> str:
    names = sorted(keys)
    few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return (
        f"{source} holds tensors of a kind that cannot be read here, {len(names)} of {of}: {few}. Known are LoKr "
        "(lokr_w1 …), LoRA (lora_up or lora_B …), LoHa (hada_w1_a …), whole updates (diff) and the paper authors' "
        "checkpoints; load_krona reads this library's own files."
    )


def _is_reference(layer: _Layer) -> bool:
    """Whether up and down, with the names of older Diffusers, cannot be a LoRA's: their ranks differ."""
    up, down = layer.parts.get("up"), layer.parts.get("down")
    if _PROCESSOR not in layer.kinds or up is None or down is None:
        return False
    return up.dim() == down.dim() == 2 and up.shape[1] != down.shape[0]
