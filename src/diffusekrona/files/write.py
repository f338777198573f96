"""KronA adapters as other programs' files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from ..errors import AdapterFileError
from ..storage import data_hash, safetensors_bytes, write_whole
from ..tuner.names import layer_of
from .formats import Format, lokr, lora
from .formats import krona as krona_format
from .formats.krona import SavedAdapter
from .kronecker import krona_update
from .layouts.programs import Naming, Program, naming, warnings_for
from .regroup import NamedLayer, named_layers

_ARCHITECTURES = {
    ("UNet2DConditionModel", 2048): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    ("UNet2DConditionModel", 1024): ("stable-diffusion-v2-768-v", "sd_v2"),
    ("UNet2DConditionModel", 768): ("stable-diffusion-v1", "sd_v1"),
    ("FluxTransformer2DModel", None): ("flux-1-dev", "flux1"),
    ("SD3Transformer2DModel", None): ("stable-diffusion-3", "sd3"),
}
"""Denoiser and width of its text → what modelspec and kohya's scripts call the architecture."""


Say = Callable[[str], None]
"""Is told a sentence before a file is written."""

_PREDICT_NOISE = (_ARCHITECTURES["UNet2DConditionModel", 2048], _ARCHITECTURES["UNet2DConditionModel", 768])
"""Those that always do; Stable Diffusion 2.x has models of both kinds, and transformers predict velocities."""

_PROGRAMS: dict[str, Program] = {"lokr": "comfyui", "lokr-diffusers": "diffusers"}
"""Formats that are not called as the program that they are for."""


def check_format(name: str) -> Format:
    """The format of that name.

    Raises:
        AdapterFileError: there is none.
    """
    for known in get_args(Format):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise AdapterFileError(f"There is no format {name!r}; there are: {', '.join(get_args(Format))}.")


def check_output(path: Path, format: str) -> None:
    """Raise `AdapterFileError` if there is no such format, or the path does not suit it."""
    if check_format(format) != "krona" and path.suffix != ".safetensors":
        raise AdapterFileError(f"A file for other programs is a single one: let {path} end in .safetensors.")


def write(
    path: Path,
    adapters: Mapping[str, SavedAdapter],
    components: Mapping[str, nn.Module],
    format: Format,
    metadata: Mapping[str, str] | None = None,
    whole: bool = False,
    say: Say | None = None,
) -> None:
    """Write adapters in a format, as `check_output` and `foreign_bytes` allow, whole or not at all."""
    check_output(path, format)
    if format == "krona":
        krona_format.write(path, adapters)
        return
    if format == "lora" and say is not None:
        say(_size_as_lora(adapters))
    write_whole({path: foreign_bytes(adapters, components, format, metadata, whole)})


def foreign_bytes(
    adapters: Mapping[str, SavedAdapter],
    components: Mapping[str, nn.Module],
    format: Format,
    metadata: Mapping[str, str] | None = None,
    whole: bool = False,
) -> bytes:
    """A file that another program reads as exactly these adapters' updates.

    Args:
        adapters: by component.
        components: the model's, which say how other programs name and fuse the layers.
        format: any but "krona".
        metadata: more header entries, such as `ss_steps`; they win over those that are known here.
        whole: multiply out each B that is a product, for programs that do not read it so.

    Raises:
        AdapterFileError: the format cannot hold an adapter, or the program has no name for a layer.
    """
    program = program_of(format)
    tensors: dict[str, Tensor] = {}
    for part, saved in adapters.items():
        check_fits(saved, format)
        rule = naming(program, part, components[part], components)
        layers = named_layers(saved, components[part], rule)
        # Whole factors have no rank; that of the header keeps programs from scaling them by it.
        tensors |= _tensors(layers, rule, whole, rank_of_whole=saved.config.b_rank or 1)
        products = [name for name, layer in layers.items() if not whole and layer.update.b_parts is not None]
        factors = {name: layer.update.shapes for name, layer in layers.items()}
        for text in warnings_for(program, part, components[part], list(layers), products, factors, components):
            warnings.warn(text, UserWarning, stacklevel=2)
    header = {**_header(adapters, components, tensors, format), **(metadata or {})}
    return safetensors_bytes(tensors, header)


def program_of(format: Format) -> Program:
    """Whom a format, other than ours, is for."""
    return _PROGRAMS.get(format, format)  # type: ignore[arg-type]


def _tensors(layers: Mapping[str, NamedLayer], rule: Naming, whole: bool, rank_of_whole: int) -> dict[str, Tensor]:
    if rule.tensors != "lokr":
        exact = {name: lora.exact(layer.update, layer.kernel) for name, layer in layers.items()}
        return lora.tensors(exact, kohya=rule.tensors == "lora_down/lora_up")
    _check_terms(layers)
    tensors = lokr.tensors({name: _factors(layer, whole) for name, layer in layers.items()}, rank_of_whole)
    return {name: tensor for name, tensor in tensors.items() if rule.alpha or not name.endswith(".alpha")}


def _size_as_lora(adapters: Mapping[str, SavedAdapter]) -> str:
    """What an exact LoRA takes, beside the Kronecker products: rank(A)·rank(B)·(d + h) numbers for each."""
    names = [
        (saved, name) for saved in adapters.values() for name in dict.fromkeys(map(layer_of, saved.tensors)) if name
    ]
    updates = [krona_update(name, saved) for saved, name in names]
    ranks = [lora.exact_rank(update) for update in updates]
    numbers = sum(rank * (update.shapes.d + update.shapes.h) for rank, update in zip(ranks, updates, strict=True))
    own = sum(update.parameters for update in updates)
    return (
        f"An exact LoRA has rank {min(ranks)} to {max(ranks)}: {numbers:,} numbers, {4 * numbers / 1e6:,.1f} MB, where "
        f"the Kronecker products have {own:,}"
    )


def check_fits(saved: SavedAdapter, format: Format = "lokr") -> None:
    """Raise `AdapterFileError` if a format of other programs cannot hold what an adapter is, sums of products aside."""
    config = saved.config
    problem = ""
    if config.modules_to_save:
        problem = f"it holds whole modules ({', '.join(config.modules_to_save)}) beside its factors"
    elif config.layout != "kron" and format != "lora":
        problem = (
            "its outputs are in the order of the paper authors' code, which LoKr does not have: merge it instead, or "
            "write it as a LoRA"
        )
    if problem:
        raise AdapterFileError(
            f"This adapter cannot be written as {'LoRA' if format == 'lora' else 'LoKr'}: {problem}."
        )


def _check_terms(layers: Mapping[str, NamedLayer]) -> None:
    several = [name for name, layer in layers.items() if layer.update.num_terms > 1]
    if several:
        raise AdapterFileError(
            f"{len(several)} layers of this adapter are sums of several products, such as {several[0]}, and LoKr holds "
            "one: write it as a LoRA, which is exact (format 'lora', --to lora), or approximate it by one product "
            "(diffusekrona convert --factors A1,A2)."
        )


def _factors(layer: NamedLayer, whole: bool) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor], float]:
    """A, B (a convolution's with the kernel apart; or B1 and B2) and s of a layer."""
    update, kernel = layer.update, layer.kernel
    if whole or update.b_parts is None:
        return update.A, update.B.reshape(len(update.B), -1, *kernel), update.scale
    left, right = update.b_parts
    return update.A, (left, right.reshape(len(right), -1, *kernel)), update.scale


def _header(
    adapters: Mapping[str, SavedAdapter],
    components: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    format: Format,
) -> dict[str, str]:
    """What kohya's scripts (`ss_…`) and Stability AI's modelspec write about an adapter, as far as it is known."""
    config = next(iter(adapters.values())).config
    factors = {name: str(value) for name in ("a1", "a2", "b1") if (value := getattr(config, name)) is not None}
    arguments = {"algo": "lokr", "full_matrix": str(config.b_rank is None), **factors}
    header = {
        "sshs_model_hash": data_hash(tensors),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
    }
    if format != "lora":
        header |= {
            "ss_network_module": "lycoris.kohya",
            "ss_network_dim": str(config.b_rank or "Dynamic"),
            "ss_network_alpha": str(config.b_rank or 1),
            "ss_network_args": json.dumps(arguments, sort_keys=True),
        }
    denoiser: Any = next(iter(components.values()))
    of = getattr(denoiser, "config", None)
    known = _ARCHITECTURES.get((type(denoiser).__name__, getattr(of, "cross_attention_dim", None)))
    if known in _PREDICT_NOISE:
        header["modelspec.prediction_type"] = "epsilon"
    if known is not None:
        header["modelspec.architecture"], header["ss_base_model_version"] = f"{known[0]}/lora", known[1]
    base = getattr(of, "_name_or_path", None) or config.base_model_name_or_path
    if base:
        header["ss_sd_model_name"] = str(base)
    return header
