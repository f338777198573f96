"""Other programs' adapter files: which method each layer holds, told by the names of its tensors.

A tensor is named by its layer and a part, such as `lora_unet_mid_block_attentions_0_proj_in.lokr_w1`. Which module of
a model a layer's name stands for is not a matter of the file: see `layouts.names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ...errors import AdapterFileError
from ...storage import TensorFile
from ..unused import STRICT, Reading, Unused, few
from . import full, loha, lokr, lora, lycoris_modules, peft_modules, reference
from .krona import CONFIG_NAME, WEIGHTS_NAME
from .scales import HEADER, Scales, from_header
from .updates import KroneckerUpdate, LayerTensors, Update

LARGEST_FACTORS = 1 << 28
"""Numbers of all Kronecker factors that reading a file builds, where it holds products."""

_PROCESSOR = "processor"
_LYCORIS_IA3 = "ia3 of LyCORIS"
_READERS: dict[str, Callable[[LayerTensors], Update]] = {
    "lokr": lokr.read,
    "lora": lora.read,
    "loha": loha.read,
    "full": full.read,
    "reference": reference.read,
    "oft": peft_modules.read_oft,
    "boft": peft_modules.read_boft,
    "ia3": peft_modules.read_ia3,
    "diag-oft": lycoris_modules.read_oft,
    "glora": lycoris_modules.read_glora,
    _LYCORIS_IA3: lycoris_modules.read_ia3,
}
_PARTS: dict[str, dict[str, str]] = {
    "lokr": lokr.PARTS,
    "lora": lora.PARTS,
    _PROCESSOR: lora.PROCESSOR_PARTS,
    "loha": loha.PARTS,
    "full": full.PARTS,
    "": {
        ".alpha": "alpha",
        ".diff_b": "bias",
        ".b_norm": "bias",
        ".dora_scale": "dora_scale",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
        ".lora_magnitude_vector.default.weight": "magnitude",
    },
    "oft": peft_modules.OFT_PARTS,
    "boft": peft_modules.BOFT_PARTS,
    "ia3": peft_modules.IA3_PARTS,
    "diag-oft": lycoris_modules.OFT_PARTS,
    "glora": lycoris_modules.GLORA_PARTS,
    _LYCORIS_IA3: lycoris_modules.IA3_PARTS,  # the last, since ".weight" ends other names too
}
_TOGETHER = ("glora", _LYCORIS_IA3)
"""Methods whose tensors have names that say nothing, unless all of them are there."""
_ENDINGS = {ending: (kind, part) for kind, parts in _PARTS.items() for ending, part in parts.items()}


class _Layer(NamedTuple):
    """One layer's tensors by part, and the methods that their names belong to."""

    kinds: set[str]
    parts: dict[str, Tensor]


def read(file: TensorFile, reading: Reading | None = None, unused: Unused | None = None) -> dict[str, Update]:
    """Every layer's update in another program's file, by the layer's name as the file writes it.

    For a PEFT folder's `adapter_model.safetensors`, the scales come from the `adapter_config.json` beside it.

    Args:
        file: the file.
        reading: how to read what programs disagree about.
        unused: collects what cannot be read; without it, that is an error.

    Raises:
        AdapterFileError: the file holds what `parse` does not take.
    """
    metadata, beside = file.metadata, file.path.with_name(CONFIG_NAME)
    if file.path.name == WEIGHTS_NAME and HEADER not in metadata and beside.is_file():
        try:
            metadata = {**metadata, HEADER: beside.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterFileError(f"{beside} cannot be read: {error}.") from error
    return parse(file.tensors, metadata, str(file.path), reading or STRICT, unused)


def parse(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    source: str = "The file",
    reading: Reading = STRICT,
    unused: Unused | None = None,
) -> dict[str, Update]:
    """Every layer's update, by the layer's name as the file writes it. A file may mix methods from layer to layer.

    Args:
        tensors: the file's tensors by name.
        metadata: the file's header, which may hold PEFT's config.
        source: what to call the file in errors.
        reading: how to read what programs disagree about.
        unused: collects tensors that are not known here, and layers that are damaged; without it, they are an error.

    Raises:
        AdapterFileError: without `unused`, there is nothing in it, or a tensor of a kind that is not known here, or a
            layer whose tensors are incomplete, not finite or do not fit each other. In any case, a header that is
            damaged, or two tensors for one part of a layer.
    """
    not_used = unused or Unused(source)
    layers = _layers(tensors, source, not_used)
    scales = from_header(metadata or {}, source, _common_rank(layers), reading.alpha_of_whole)
    if any("alpha" in layer.parts for _, _, layer in layers):
        scales = replace(scales, alpha=None)
    scales.check([name for name, _, _ in layers])
    updates, built = {}, 0
    for name, kind, layer in layers:
        try:
            update = updates[name] = _update(name, kind, layer, scales, source)
        except AdapterFileError as error:
            not_used.add(str(error))
            continue
        if kind == "lokr" and isinstance(update, KroneckerUpdate):
            built += lokr.numbers_built(layer.parts, update)
        if built > LARGEST_FACTORS:
            raise AdapterFileError(
                f"{source} holds small factors of products that take more than {LARGEST_FACTORS:,} numbers together, "
                "more than any model's: the file is damaged, or made to do harm."
            )
    scales.warn()
    if unused is None:
        not_used.report(len(updates))
    return updates


def _update(name: str, kind: str, layer: _Layer, scales: Scales, source: str) -> Update:
    update = _READERS[kind](LayerTensors(f"{source}: the layer {name}", name, layer.parts, scales))
    update.check_size()
    return update


def _common_rank(layers: Iterable[tuple[str, str, _Layer]]) -> int | None:
    """The rank of all decomposed layers of LoKr; None if there are none, or of several ranks."""
    products = [
        layer.parts[part].shape[0]
        for _, kind, layer in layers
        for part in ("w1_b", "w2_b")
        if kind == "lokr" and part in layer.parts and layer.parts[part].dim()
    ]
    return products[0] if len(set(products)) == 1 else None


def _layers(tensors: Mapping[str, Tensor], source: str, unused: Unused) -> list[tuple[str, str, _Layer]]:
    """Name, method and tensors of each layer, in the file's order."""
    layers = _grouped(tensors, source, unused)
    processor = "reference" if any(map(_is_reference, layers.values())) else "lora"
    found = []
    for name, layer in layers.items():
        kinds = layer.kinds - {""} or ({"full"} if "bias" in layer.parts else set())
        if len(kinds) != 1:
            unused.add(
                f"{source}: the layer {name} holds only {', '.join(sorted(layer.parts))}, which is "
                + (f"of several methods at once ({', '.join(sorted(kinds))})." if kinds else "no update by itself.")
            )
            continue
        kind = kinds.pop()
        found.append((name, processor if kind == _PROCESSOR else kind, layer))
    return found


def _grouped(tensors: Mapping[str, Tensor], source: str, unused: Unused) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(ending) and _is_told(key, ending, tensors)), None)
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
        unused.add(_not_known(unknown, len(tensors), source))
    if not tensors:
        unused.add(f"{source} holds no tensors.")
    return layers


def _is_told(key: str, ending: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the end of a tensor's name tells its method, which that of some does only with the others beside it."""
    kind, _ = _ENDINGS[ending]
    layer = key.removesuffix(ending)
    return kind not in _TOGETHER or all(f"{layer}{other}" in tensors for other in _PARTS[kind])


def _not_known(keys: Iterable[str], of: int, source: str) -> str:
    names = sorted(keys)
    if all(map(_is_embedding, names)):
        return (
            f"{source} holds embeddings of new words beside its layers, {len(names)} of {of} tensors: {few(names)}. "
            "Save them into a file of their own, and load it with the pipeline's load_textual_inversion."
        )
    return (
        f"{source} holds tensors of a kind that cannot be read here, {len(names)} of {of}: {few(names)}. Known are "
        "LoKr (lokr_w1 …), LoRA (lora_up or lora_B …), LoHa (hada_w1_a …), whole updates (diff), OFT and BOFT "
        "(oft_blocks, oft_R, boft_R …), GLoRA (a1, a2, b1 and b2), (IA)³ (ia3_l, or weight and on_input) and the paper "
        "authors' checkpoints; load_krona reads this library's own files."
    )


def _is_embedding(name: str) -> bool:
    return name.startswith(("bundle_emb.", "emb_params"))


def _is_reference(layer: _Layer) -> bool:
    """Whether up and down, with the names of older Diffusers, cannot be a LoRA's: their ranks differ."""
    up, down = layer.parts.get("up"), layer.parts.get("down")
    if _PROCESSOR not in layer.kinds or up is None or down is None:
        return False
    return up.dim() == down.dim() == 2 and up.shape[1] != down.shape[0]
