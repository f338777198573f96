"""Merging an adapter into a model's files, one tensor in memory at a time: a pipeline's folder, or a single file."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from ..bases.architectures import build_pipeline
from ..bases.loading import BaseModelError, config_in_float32
from ..errors import MergeError
from ..kron.exact import MERGEABLE_DTYPES
from ..storage import open_safetensors, read_names
from ..tuner.names import DENOISERS, TEXT_ENCODERS
from .layouts.names import foreign_names, layer_names
from .layouts.unet import original_names
from .merge import Change, ParameterPlace, changes_of, merged
from .read import updates_in
from .unused import STRICT, Reading

_KINDS = ("weight", "bias")
_ADAPTABLE = (*DENOISERS, *TEXT_ENCODERS)
_UNET, _CLIP_L, _CLIP_G, _SD_CLIP = (
    "model.diffusion_model.",
    "conditioner.embedders.0.transformer.text_model.",
    "conditioner.embedders.1.model.transformer.resblocks.",
    "cond_stage_model.transformer.text_model.",
)
_IN_OPEN_CLIP = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


@dataclass(frozen=True)
class Spot:
    """Where in a file a layer's weight or bias is: a tensor, or some rows of one that holds several layers."""

    place: ParameterPlace
    rows: tuple[int, int] | None = None


def merge_into_files(base: Path, adapter: Path, output: Path, weight: float = 1.0, reading: Reading = STRICT) -> int:
    """Write a model with an adapter merged into it: each changed weight is W + weight · ΔW, rounded once.

    All other weights are copied as they are. Where no dtype is asked for, a folder loads in float32, whatever its
    weights are stored in. The output appears when it is whole.

    Args:
        base: a folder in Diffusers' layout, or a single .safetensors file of SDXL or SD 1.x in its original layout.
        adapter: any adapter file or folder that `merge_file` reads.
        output: the folder or file to write; it must not exist.
        weight: the adapter's strength.
        reading: what to do about tensors that cannot be used, and where programs disagree.

    Returns:
        How many layers changed.

    Raises:
        BaseModelError: the base is not such a model.
        AdapterFileError: the adapter cannot be read, or does not fit.
        MergeError: some weight would not be finite, or is quantized.
        OSError: the disk is full, or the output exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already; give a path where there is nothing.")
    merge = _merge_folder if base.is_dir() else _merge_file
    return merge(base, adapter, output, weight, reading)


def _merge_folder(base: Path, adapter: Path, output: Path, weight: float, reading: Reading) -> int:
    components = folder_components(base)
    changes = changes_of(updates_in(adapter, components, reading))
    with _whole_or_not(output) as staged:
        staged.mkdir()
        for path in sorted(base.rglob("*")):
            target = staged / path.relative_to(base)
            part = path.relative_to(base).parts[0]
            if path.is_dir():
                target.mkdir()
            elif path.suffix == ".safetensors" and any(part == changed for changed, _, _ in changes):
                names = foreign_names(part, components[part])
                spots = {
                    f"{alias}.{kind}": [Spot((part, name, kind))] for alias, name in names.items() for kind in _KINDS
                }
                _rewrite(path, target, spots, changes, weight)
            elif path.name == "config.json":
                target.write_text(config_in_float32(path), encoding="utf-8")
            else:
                shutil.copy2(path, target)
        _check_all_there(changes, staged, components)
    return len({place[:2] for place in changes})


def _check_all_there(
    changes: Mapping[ParameterPlace, Change], folder: Path, components: Mapping[str, nn.Module]
) -> None:
    for part in dict.fromkeys(part for part, _, _ in changes):
        held = {name for path in (folder / part).glob("*.safetensors") for name in read_names(path)[0]}
        names = foreign_names(part, components[part])
        present = {(name, kind) for alias, name in names.items() for kind in _KINDS if f"{alias}.{kind}" in held}
        missing = [name for of, name, kind in changes if of == part and (name, kind) not in present]
        if missing:
            raise BaseModelError(
                f"The folder {part} of the base has no safetensors weight or bias for {len(missing)} layers of the "
                f"adapter, such as {missing[0]}; save the base anew with pipe.save_pretrained(folder)."
            )


def _merge_file(base: Path, adapter: Path, output: Path, weight: float, reading: Reading) -> int:
    components, spots = checkpoint_layers(read_names(base)[0], base)
    changes = changes_of(updates_in(adapter, components, reading))
    there = {spot.place for of_tensor in spots.values() for spot in of_tensor}
    missing = [place for place in changes if place not in there]
    if missing:
        raise BaseModelError(f"{base} has no weight for {len(missing)} layers of the adapter, such as {missing[0][1]}.")
    with _whole_or_not(output) as staged:
        _rewrite(base, staged, spots, changes, weight)
    return len({place[:2] for place in changes})


def folder_components(folder: Path, device: str = "meta") -> dict[str, nn.Module]:
    """The denoiser and text encoders of a pipeline's folder, without its weights: by default without any.

    Raises:
        BaseModelError: it is no pipeline's folder, or has a component of an unknown class.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        named = {part: index[part][1] for part in _ADAPTABLE if isinstance(index.get(part), list) and index[part][1]}
        with torch.device(device):
            return {part: _without_weights(folder / part, name) for part, name in named.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BaseModelError(f"{folder} is not a pipeline's folder that can be read ({error}).") from error


def _without_weights(folder: Path, name: str) -> nn.Module:
    kind: Any = getattr(diffusers, name, None) or getattr(transformers, name)
    model: nn.Module
    if issubclass(kind, diffusers.ModelMixin):
        model = kind.from_config(kind.load_config(folder))
    else:
        model = kind(kind.config_class.from_pretrained(folder))
    return model


def checkpoint_layers(names: list[str], source: Path) -> tuple[dict[str, nn.Module], dict[str, list[Spot]]]:
    """The models that a single-file checkpoint holds, without weights, and which tensor holds which layers.

    Raises:
        BaseModelError: it is not of SDXL or SD 1.x in their original layout.
    """
    held = set(names)
    if any(name.startswith("conditioner.embedders.1.model.") for name in held):
        components = build_pipeline("sdxl")
        encoders = {
            **_clip_spots(components, "text_encoder", _CLIP_L),
            **_open_clip_spots(components["text_encoder_2"]),
        }
    elif any(name.startswith(_SD_CLIP) for name in held):
        components = build_pipeline("sd15")
        encoders = _clip_spots(components, "text_encoder", _SD_CLIP)
    else:
        raise BaseModelError(
            f"{source} is not a checkpoint of SDXL or SD 1.x in its original layout; convert it to Diffusers' folder "
            "first, with from_single_file(file).save_pretrained(folder) of its pipeline's class."
        )
    unet = components["unet"]
    originals = original_names(unet, layer_names(unet))
    layers = {
        f"{_UNET}{own}.{kind}": [Spot(("unet", name, kind))] for name, own in originals.items() for kind in _KINDS
    }
    return components, {name: spots for name, spots in {**layers, **encoders}.items() if name in held}


def _clip_spots(components: Mapping[str, nn.Module], part: str, prefix: str) -> dict[str, list[Spot]]:
    names = layer_names(components[part])
    return {
        f"{prefix}{name.removeprefix('text_model.')}.{kind}": [Spot((part, name, kind))]
        for name in names
        for kind in _KINDS
    }


def _open_clip_spots(encoder: nn.Module) -> dict[str, list[Spot]]:
    """OpenCLIP's names; Q, K and V of a layer are one tensor."""
    spots: dict[str, list[Spot]] = {}
    for name, module in encoder.named_modules():
        _, found, inside = name.partition("encoder.layers.")
        number, _, layer = inside.partition(".")
        if found and layer in _IN_OPEN_CLIP:
            for kind in _KINDS:
                spots[f"{_CLIP_G}{number}.{_IN_OPEN_CLIP[layer]}.{kind}"] = [Spot(("text_encoder_2", name, kind))]
        elif found and layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            assert isinstance(module, nn.Linear)
            first = "qkv".index(layer[10]) * module.out_features
            rows = (first, first + module.out_features)
            for kind in _KINDS:
                held = spots.setdefault(f"{_CLIP_G}{number}.attn.in_proj_{kind}", [])
                held.append(Spot(("text_encoder_2", name, kind), rows))
    return spots


def _rewrite(
    source: Path,
    target: Path,
    spots: Mapping[str, list[Spot]],
    changes: Mapping[ParameterPlace, Change],
    weight: float,
) -> None:
    """Copy a safetensors file with changed weights; they keep their shapes and dtypes, so its header stays."""
    with source.open("rb") as raw, target.open("xb") as out, open_safetensors(source) as file:
        start = raw.read(8)
        text = raw.read(int.from_bytes(start, "little"))
        out.write(start + text)
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            tensor = file.get_tensor(name)
            for spot in spots.get(name, []):
                if spot.place in changes:
                    tensor = _changed(tensor, spot, changes[spot.place], weight, name)
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _changed(tensor: Tensor, spot: Spot, change: Change, weight: float, name: str) -> Tensor:
    if tensor.dtype not in MERGEABLE_DTYPES:
        raise MergeError(f"{name} is kept as {tensor.dtype}: merge into a base that is not quantized.")
    tensor = tensor.clone()
    base = tensor if spot.rows is None else tensor[slice(*spot.rows)]
    base.copy_(merged(base, change(base), weight))
    if not bool(base.isfinite().all()):
        raise MergeError(f"{name} would hold an infinity or a NaN. Nothing was written.")
    return tensor


@contextmanager
def _whole_or_not(output: Path) -> Iterator[Path]:
    """A path beside the output to write to, which becomes the output when all is written, else is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield staged
        os.replace(staged, output)
    finally:
        if staged.is_dir():
            shutil.rmtree(staged, ignore_errors=True)
        staged.unlink(missing_ok=True)
