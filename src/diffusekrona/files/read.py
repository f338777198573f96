"""Adapter files of any program, opened once: as KronA adapters of a model, or as the updates of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError, FactorShapeError
from ..kron.shapes import update_shapes
from ..storage import TensorFile, read_safetensors
from ..tuner.compat import ModulesToSaveWrapper
from ..tuner.config import KronAConfig
from ..tuner.names import FACTORS, PREFIX, factor_name, is_denoiser
from ..tuner.targets import common_and_pattern, layer_alpha, layer_shapes, target_layers, target_only
from .formats import foreign
from .formats import krona as krona_format
from .formats.krona import HEADER, WEIGHTS_NAME, SavedAdapter
from .formats.updates import KroneckerUpdate, Update
from .layouts.names import resolve

Place = tuple[str, str]
"""Component and name of a layer."""


def read_adapters(source: Path, components: Mapping[str, nn.Module]) -> dict[str, SavedAdapter]:
    """The KronA adapter of each component of a model that a file or folder of any program holds.

    Raises:
        AdapterFileError: it cannot be read or does not fit this model; or some update is no Kronecker product.
    """
    files = opened(source)
    ours = are_ours(files)
    if ours:
        adapters = by_component(krona_format.read(files), components, source)
    else:
        adapters = as_krona(foreign_updates(files, components), components, source)
    for part, saved in adapters.items():
        check_fit(components[part], saved, numbers=ours)  # those of other programs' files are checked
    return adapters


def updates_in(source: Path, components: Mapping[str, nn.Module]) -> dict[Place, Update]:
    """Every layer's update in any adapter file or folder.

    Raises:
        AdapterFileError: it cannot be read, does not fit these models, or holds more than updates of layers.
    """
    files = opened(source)
    if not are_ours(files):
        return foreign_updates(files, components)
    updates: dict[Place, Update] = {}
    for part, saved in by_component(krona_format.read(files), components, source).items():
        check_fit(components[part], saved)
        if saved.config.modules_to_save:
            raise AdapterFileError(
                f"{source} holds whole modules ({', '.join(saved.config.modules_to_save)}) beside its updates; load it "
                "with load_krona."
            )
        updates.update(
            {(part, name): krona_update(name, saved) for name in target_layers(components[part], saved.config)}
        )
    return updates


def opened(source: Path) -> dict[str, TensorFile]:
    """The files of an adapter by component, "" for one that names its components itself.

    A folder may hold PEFT's `adapter_model.safetensors`, itself or in a folder for each component, or one other file.

    Raises:
        AdapterFileError: nothing to read, a pickle, or a damaged file.
    """
    return {part: TensorFile(path, *read_safetensors(path)) for part, path in _files_of(source).items()}


def _files_of(source: Path) -> dict[str, Path]:
    if not source.exists():
        raise AdapterFileError(f"{source} does not exist.")
    if not source.is_dir():
        return {"": source}
    parts = krona_format.saved_parts(source)
    if parts:
        return {part: source / part / WEIGHTS_NAME for part in (parts if "" not in parts else [""])}
    files = sorted(source.glob("*.safetensors"))
    if len(files) == 1:
        return {"": files[0]}
    found = ", ".join(sorted(path.name for path in source.iterdir())) or "nothing"
    raise AdapterFileError(
        f"{source} holds no {WEIGHTS_NAME}, neither itself nor in a component's folder, and not exactly one "
        f"other .safetensors file. It holds: {found}."
    )


def are_ours(files: Mapping[str, TensorFile]) -> bool:
    """Whether files that were opened together are this library's own."""
    return any(HEADER in file.metadata or any(f".{PREFIX}" in name for name in file.tensors) for file in files.values())


def foreign_updates(files: Mapping[str, TensorFile], components: Mapping[str, nn.Module]) -> dict[Place, Update]:
    """What other programs' files say about each layer of a model.

    Args:
        files: by component, as `opened` gives them.
        components: the model's.

    Raises:
        AdapterFileError: a file is damaged, or names layers that the model does not have.
    """
    updates: dict[Place, Update] = {}
    for part, file in files.items():
        found = foreign.read(file)
        known = {part: components[part]} if part and part in components else components
        places = resolve(found, known, str(file.path))
        updates.update({places[key]: update for key, update in found.items()})
    return updates


def krona_update(name: str, saved: SavedAdapter) -> KroneckerUpdate:
    """The update of a layer in an adapter of ours.

    Raises:
        AdapterFileError: a factor is missing.
    """
    factors = {
        key: saved.tensors[factor_name(name, key)].float() for key in FACTORS if factor_name(name, key) in saved.tensors
    }
    if factors.keys() not in ({"A", "B"}, {"A", "B1", "B2"}):
        raise AdapterFileError(f"{saved.source} has not all factors of the layer {name}.")
    return KroneckerUpdate(
        factors["A"],
        factors["B"] if "B" in factors else torch.matmul(factors["B1"], factors["B2"]),
        layer_alpha(saved.config, name),
        layout=saved.config.layout,
        kind="krona",
        where=f"{saved.source}: the layer {name}",
        parameters=sum(factor.numel() for factor in factors.values()),
    )


def by_component(
    saved: dict[str, SavedAdapter], components: Mapping[str, nn.Module], source: Path
) -> dict[str, SavedAdapter]:
    """The adapters of a file by the components of a model that they are for.

    A single module's adapter fits a pipeline's denoiser, and the denoiser's a single module.

    Raises:
        AdapterFileError: the model lacks a component.
    """
    if set(saved) <= set(components):
        return {part: saved[part] for part in components if part in saved}
    denoisers = [part for part in saved if is_denoiser(part)]
    target = next(iter(components))
    if len(denoisers) == 1 and (list(saved) == denoisers or target == ""):
        return {target: saved[denoisers[0]]}
    raise AdapterFileError(
        f"{source} holds an adapter for {', '.join(sorted(saved))}, but this model has "
        f"{', '.join(part or 'no named components' for part in components)}."
    )


def as_krona(
    updates: Mapping[Place, Update], components: Mapping[str, nn.Module], source: Path
) -> dict[str, SavedAdapter]:
    """The same updates as a KronA adapter of each component.

    Raises:
        AdapterFileError: some update is no Kronecker product, or has DoRA's magnitudes; or layouts or numbers of terms
            differ.
    """
    layers: dict[Place, KroneckerUpdate] = {}
    for place, update in updates.items():
        if update.dora_scale is not None or not isinstance(update, KroneckerUpdate):
            raise AdapterFileError(_no_product(update, source))
        layers[place] = update
    if len({layer.layout for layer in layers.values()}) > 1:
        raise AdapterFileError(f"{source} mixes LoKr with layers of the paper authors' layout, which is not supported.")
    return {
        part: _adapter({name: one for (of, name), one in layers.items() if of == part}, components[part], source)
        for part in dict.fromkeys(part for part, _ in layers)
    }


def _no_product(update: Update, source: Path) -> str:
    kind = "DoRA" if update.dora_scale is not None else {"lora": "LoRA", "loha": "LoHa"}.get(update.kind, "whole")
    return (
        f"{source} holds {kind} updates, which are no Kronecker products, so they cannot become an adapter exactly. "
        "merge_file(pipe, path) merges them into the weights exactly; `diffusekrona convert` finds the nearest "
        "Kronecker products."
    )


def check_fit(component: nn.Module, saved: SavedAdapter, numbers: bool = True) -> None:
    """Raise `AdapterFileError` unless an adapter has just the tensors that its config means in a component.

    The text says what is missing, unknown, misshapen or, where `numbers` asks for it, not finite, and where the file
    was read.
    """
    factors = _expected_factors(component, saved)
    expected = {**factors, **_expected_copies(component, saved)}
    present = {key: tuple(tensor.shape) for key, tensor in saved.tensors.items()}
    misshapen = [
        f"{key} is {_times(present[key])}, not {_times(shape)}"
        for key, shape in expected.items()
        if present.get(key, shape) != shape
    ]
    problems = [
        "" if factors else "its config means no layer of this model",
        _list("not in this model", [key for key in present if key not in expected]),
        _list("missing from the file", [key for key in expected if key not in present]),
        _list("misshapen", misshapen),
    ]
    if numbers:
        problems += [
            _list("not of floating-point numbers", [key for key in factors if _is_whole(saved.tensors.get(key))]),
            _list("without finite values", [key for key, t in saved.tensors.items() if not _is_finite(t)]),
        ]
    found = [problem for problem in problems if problem]
    if found:
        raise AdapterFileError(
            f"{saved.source} does not fit this {type(component).__name__}, which is unchanged:\n  "
            + "\n  ".join(found)
            + ("\n  It looks made for another architecture." if not set(present) & set(expected) else "")
        )


def _expected_factors(component: nn.Module, saved: SavedAdapter) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in target_layers(component, saved.config).items():
        try:
            shapes = layer_shapes(saved.config, name, layer)
        except FactorShapeError as error:
            raise AdapterFileError(
                f"{saved.source} does not fit this {type(component).__name__}, which is unchanged: "
                f"{name}: {error}. It looks made for another architecture."
            ) from error
        expected.update({factor_name(name, factor): size for factor, size in shapes.tensors.items()})
    return expected


def _expected_copies(component: nn.Module, saved: SavedAdapter) -> dict[str, tuple[int, ...]]:
    endings = tuple(saved.config.modules_to_save or ())
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in component.named_modules():
        # PEFT takes every module whose name ends so, at a dot or not.
        if name.endswith(endings):
            original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            expected.update({f"{name}.{key}": tuple(t.shape) for key, t in original.state_dict().items()})
    return expected


def _is_whole(tensor: Tensor | None) -> bool:
    return tensor is not None and not tensor.is_floating_point()


def _is_finite(tensor: Tensor) -> bool:
    # In fp32, which the factors are kept in: a large fp64 number is an infinity there.
    return bool(torch.isfinite(tensor.float()).all())


def _list(what: str, items: list[str], shown: int = 3) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} tensor(s) {what}: {', '.join(items[:shown])}{more}" if items else ""


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "a single number"


def _adapter(layers: Mapping[str, KroneckerUpdate], component: nn.Module, source: Path) -> SavedAdapter:
    b_rank = _common_b_rank(layers)
    (a1, a2), factor_pattern = common_and_pattern({name: layer.shapes[:2] for name, layer in layers.items()})
    alpha, alpha_pattern = common_and_pattern({name: layer.scale for name, layer in layers.items()})
    config = KronAConfig(
        a1=a1,
        a2=a2,
        alpha=alpha,
        num_terms=next(iter(layers.values())).num_terms,
        b_rank=b_rank,
        layout=next(iter(layers.values())).layout,
        factor_pattern=factor_pattern,
        alpha_pattern=alpha_pattern,
    )
    target_only(config, component, layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[factor_name(name, "A")] = layer.A.contiguous()
        if b_rank is not None and layer.b_parts is not None:
            for key, part in zip(("B1", "B2"), layer.b_parts, strict=True):
                tensors[factor_name(name, key)] = part.contiguous()
        else:
            tensors[factor_name(name, "B")] = layer.B.contiguous()
    return SavedAdapter(config, tensors, source)


def _common_b_rank(layers: Mapping[str, KroneckerUpdate]) -> int | None:
    """The rank with which `KronAConfig` would make products of just those B that are products; None if there is none.

    Without one, products are multiplied out, which is the same function.
    """
    ranks = {layer.b_parts[0].shape[1] for layer in layers.values() if layer.b_parts is not None}
    if len(ranks) != 1:
        return None
    rank = ranks.pop()
    agree = all(
        (update_shapes(layer.shapes, b_rank=rank).b_rank is not None) == (layer.b_parts is not None)
        for layer in layers.values()
    )
    return rank if agree else None
