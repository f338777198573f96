"""KronA adapters as other programs' files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from ..errors import AdapterFileError
from ..storage import data_hash, safetensors_bytes, write_whole
from ..tuner.names import factor_name
from ..tuner.targets import layer_alpha, layer_shapes, target_layers
from .formats import Format, lokr
from .formats import krona as krona_format
from .formats.krona import SavedAdapter
from .layouts.names import diffusers_name, kohya_name

_ARCHITECTURES = {
    ("UNet2DConditionModel", 2048): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    ("UNet2DConditionModel", 1024): ("stable-diffusion-v2-768-v", "sd_v2"),
    ("UNet2DConditionModel", 768): ("stable-diffusion-v1", "sd_v1"),
    ("FluxTransformer2DModel", None): ("flux-1-dev", "flux1"),
    ("SD3Transformer2DModel", None): ("stable-diffusion-3", "sd3"),
}
"""Denoiser and width of its text → what modelspec and kohya's scripts call the architecture."""


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
        raise AdapterFileError(f"A LoKr file is a single one: let the path {path} end in .safetensors.")


def write(
    path: Path,
    adapters: Mapping[str, SavedAdapter],
    components: Mapping[str, nn.Module],
    format: Format,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapters in a format, as `check_output` and `lokr_bytes` allow, whole or not at all."""
    check_output(path, format)
    if format == "krona":
        krona_format.write(path, adapters)
    else:
        write_whole({path: lokr_bytes(adapters, components, format, metadata)})


def lokr_bytes(
    adapters: Mapping[str, SavedAdapter],
    components: Mapping[str, nn.Module],
    naming: Format,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """A LoKr file of these adapters, which any program that multiplies w1 ⊗ w2 reads as exactly their updates.

    Args:
        adapters: by component.
        components: the model's, which say how other programs name the layers.
        naming: "lokr" or "lokr-diffusers".
        metadata: more header entries, such as `ss_steps`; they win over those that are known here.

    Raises:
        AdapterFileError: LoKr cannot hold an adapter: it has several terms, the transposed layout, or whole modules.
    """
    named = diffusers_name if naming == "lokr-diffusers" else kohya_name
    layers = {}
    for part, saved in adapters.items():
        check_fits_lokr(saved)
        for name in target_layers(components[part], saved.config):
            layers[named(part, name, components)] = _factors(components[part], name, saved)
    tensors = lokr.tensors(layers)
    header = {**_header(adapters, components, tensors), **(metadata or {})}
    return safetensors_bytes(tensors, header)


def check_fits_lokr(saved: SavedAdapter) -> None:
    """Raise `AdapterFileError` if LoKr cannot hold an adapter."""
    config = saved.config
    problem = (
        f"it sums {config.num_terms} products per layer and LoKr holds one: compress it to one term first"
        if config.num_terms > 1
        else "its outputs are in the order of the paper authors' code, which LoKr does not have: merge it instead"
        if config.layout != "kron"
        else f"it holds whole modules ({', '.join(config.modules_to_save)}) beside its factors"
        if config.modules_to_save
        else ""
    )
    if problem:
        raise AdapterFileError(f"This adapter cannot be written as LoKr: {problem}.")


def _factors(
    component: nn.Module, name: str, saved: SavedAdapter
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor], float]:
    """A, B (a convolution's with the kernel apart; or B1 and B2) and s of a layer."""
    shapes = layer_shapes(saved.config, name, component.get_submodule(name))
    kernel = (shapes.factors.b2, *shapes.kernel)
    factors = {key: saved.tensors[factor_name(name, key)] for key in shapes.tensors}
    last = factors["B" if "B" in factors else "B2"].reshape(-1, *kernel)
    return factors["A"], last if "B" in factors else (factors["B1"], last), layer_alpha(saved.config, name)


def _header(
    adapters: Mapping[str, SavedAdapter], components: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """What kohya's scripts (`ss_…`) and Stability AI's modelspec write about an adapter, as far as it is known."""
    config = next(iter(adapters.values())).config
    arguments = {"algo": "lokr", "full_matrix": str(config.b_rank is None), "a1": str(config.a1), "a2": str(config.a2)}
    header = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(config.b_rank or "Dynamic"),
        "ss_network_alpha": str(config.b_rank or 1),
        "ss_network_args": json.dumps(arguments, sort_keys=True),
        "sshs_model_hash": data_hash(tensors),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.prediction_type": "epsilon",
    }
    denoiser: Any = next(iter(components.values()))
    of = getattr(denoiser, "config", None)
    known = _ARCHITECTURES.get((type(denoiser).__name__, getattr(of, "cross_attention_dim", None)))
    if known is not None:
        header["modelspec.architecture"], header["ss_base_model_version"] = f"{known[0]}/lora", known[1]
    base = getattr(of, "_name_or_path", None) or config.base_model_name_or_path
    if base:
        header["ss_sd_model_name"] = str(base)
    return header
