"""Adapter files of any program, opened once: as KronA adapters of a model, or as the updates of its layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError, ConfigError, FactorShapeError
from ..kron.costs import cheapest_order, krona_multiply_adds
from ..kron.shapes import update_shapes
from ..storage import TensorFile, read_safetensors
from ..tuner.compat import ModulesToSaveWrapper
from ..tuner.config import KronAConfig
from ..tuner.names import FACTORS, PREFIX, factor_name, in_component, is_denoiser, layer_of
from ..tuner.targets import common_and_pattern, layer_alpha, layer_shapes, target_layers, target_only
from .formats import foreign
from .formats import krona as krona_format
from .formats.full import Full
from .formats.krona import HEADER, WEIGHTS_NAME, SavedAdapter
from .formats.library import LibraryUpdate
from .formats.updates import LARGEST_PRODUCT, LARGEST_UPDATE, KroneckerUpdate, Update
from .layouts.layout import outputs
from .layouts.names import Target, resolve
from .parts import Assembled, Piece, assembled, cut
from .unused import STRICT, Reading, Unused, few

FEW_TERMS = 8
"""Products that a layer's adapter may always sum; where there are more, they have to be cheaper than the weight."""

Place = tuple[str, str]
"""Component and name of a layer."""


def read_adapters(
    source: Path, components: Mapping[str, nn.Module], reading: Reading = STRICT
) -> dict[str, SavedAdapter]:
    """The KronA adapter of each component of a model that a file or folder of any program holds.

    Args:
        source: the file or folder.
        components: the model's.
        reading: what to do about tensors that cannot be used, and where programs disagree.

    Raises:
        AdapterFileError: it cannot be read or does not fit this model; or some update is no Kronecker product.
    """
    files = opened(source)
    ours = are_ours(files)
    unused = Unused(str(source), reading.on_unused)
    if ours:
        adapters = by_component(krona_format.read(files), components, source, unused)
        unused.report(len({(part, layer_of(key)) for part, saved in adapters.items() for key in saved.tensors}))
    else:
        layers = kronecker_only(foreign_updates(files, components, reading, unused), components, source, unused)
        unused.report(len(layers))
        adapters = as_krona(layers, components, source)
    for part, saved in adapters.items():
        check_fit(components[part], saved, numbers=ours)  # those of other programs' files are checked
    return adapters


def updates_in(source: Path, components: Mapping[str, nn.Module], reading: Reading = STRICT) -> dict[Place, Update]:
    """Every layer's update in any adapter file or folder.

    Args:
        source: the file or folder.
        components: the model's.
        reading: what to do about tensors that cannot be used, and where programs disagree.

    Raises:
        AdapterFileError: it cannot be read, does not fit these models, or holds more than updates of layers.
    """
    files = opened(source)
    unused = Unused(str(source), reading.on_unused)
    updates: dict[Place, Update] = {}
    if not are_ours(files):
        updates = foreign_updates(files, components, reading, unused)
        unused.report(len(updates))
        return updates
    for part, saved in by_component(krona_format.read(files), components, source, unused).items():
        check_fit(components[part], saved)
        if saved.config.modules_to_save:
            unused.add(
                f"{source} holds whole modules ({', '.join(saved.config.modules_to_save)}) beside its updates, which "
                "load_krona loads."
            )
        updates.update(
            {(part, name): krona_update(name, saved) for name in target_layers(components[part], saved.config)}
        )
    unused.report(len(updates))
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


def foreign_updates(
    files: Mapping[str, TensorFile],
    components: Mapping[str, nn.Module],
    reading: Reading = STRICT,
    unused: Unused | None = None,
) -> dict[Place, Update]:
    """What other programs' files say about each layer of a model.

    Args:
        files: by component, as `opened` gives them.
        components: the model's.
        reading: how to read what programs disagree about.
        unused: collects what does not fit the model; without it, that is an error.

    Raises:
        AdapterFileError: a file is damaged, or names layers that the model does not have.
    """
    pieces: dict[Place, list[Piece]] = {}
    for part, file in files.items():
        found = foreign.read(file, reading, unused)
        known = {part: components[part]} if part and part in components else components
        targets = resolve(found, known, str(file.path), unused)
        for key, target in targets.items():
            for place, piece in _pieces(found[key], target, components):
                pieces.setdefault(place, []).append(piece)
    updates: dict[Place, Update] = {}
    for (part, name), own in pieces.items():
        layer = components[part].get_submodule(name)
        update = assembled(own, outputs(layer)) if len(own) > 1 or own[0].into else own[0].update
        update.check_layer(layer)
        updates[part, name] = update
    return updates


def _pieces(update: Update, target: Target, components: Mapping[str, nn.Module]) -> Iterator[tuple[Place, Piece]]:
    """Where a file's layer goes: whole into a module, or its rows into several."""
    rows = [part.rows for part in target.parts if part.rows]
    of_file = max((last for _, last in rows), default=0)
    for part in target.parts:
        own = update if part.rows is None else cut(update, part.rows, of_file)
        yield (target.component, part.module), Piece(own, part.into)


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
    _check_factors(factors, f"{saved.source}: the layer {name}")
    b_parts = None if "B" in factors else (factors["B1"], factors["B2"])
    return KroneckerUpdate(
        factors["A"],
        factors["B"] if b_parts is None else torch.matmul(*b_parts),
        layer_alpha(saved.config, name),
        b_parts if b_parts is not None and b_parts[0].dim() == 2 else None,
        layout=saved.config.layout,
        kind="krona",
        where=f"{saved.source}: the layer {name}",
        parameters=sum(factor.numel() for factor in factors.values()),
    )


def _check_factors(factors: Mapping[str, Tensor], where: str) -> None:
    """Raise `AdapterFileError` unless A and B, or A and B1·B2, make an update, whatever model it may be for."""
    left, *right = factors.values()
    shapes = [factor.shape for factor in factors.values()]
    alike = left.dim() in (2, 3) and all(factor.dim() == left.dim() for factor in right) and all(map(math.prod, shapes))
    if (
        not alike
        or any(shape[:-2] != left.shape[:-2] for shape in shapes)
        or (len(right) == 2 and shapes[1][-1] != shapes[2][-2])
    ):
        found = ", ".join(f"{key} of {_times(tuple(factor.shape))}" for key, factor in factors.items())
        raise AdapterFileError(f"{where} has {found}, which do not fit each other; the file is damaged.")
    if not all(bool(factor.isfinite().all()) for factor in factors.values()):
        raise AdapterFileError(f"{where} holds an infinity or a NaN: its training failed, or the file is damaged.")
    size = (left.shape[-2] * shapes[1][-2], left.shape[-1] * shapes[-1][-1])
    product = math.prod((*shapes[1][:-1], shapes[-1][-1])) if len(right) == 2 else 0
    if product > LARGEST_PRODUCT or math.prod(size) > LARGEST_UPDATE:
        raise AdapterFileError(
            f"{where} is an update of {_times(size)}, or has a B, larger than any weight: the file is damaged, or made "
            "to do harm."
        )


def by_component(
    saved: dict[str, SavedAdapter],
    components: Mapping[str, nn.Module],
    source: Path,
    unused: Unused | None = None,
) -> dict[str, SavedAdapter]:
    """The adapters of a file by the components of a model that they are for.

    A single module's adapter fits a pipeline's denoiser, and the denoiser's a single module.

    Args:
        saved: by the file's components.
        components: the model's.
        source: what to call the file in errors.
        unused: collects components that the model lacks; without it, they are an error.

    Raises:
        AdapterFileError: the model lacks a component, or all of them.
    """
    found = {part: saved[part] for part in components if part in saved}
    denoisers = [part for part in saved if is_denoiser(part)]
    target = next(iter(components))
    if not found and len(denoisers) == 1 and (list(saved) == denoisers or target == ""):
        found = {target: saved[denoisers[0]]}
        missing = [part for part in saved if part not in denoisers]
    else:
        missing = [part for part in saved if part not in found]
    if missing:
        not_used = unused or Unused(str(source))
        not_used.add(
            f"{source} holds an adapter for {', '.join(sorted(saved))}, but this model has "
            f"{', '.join(part or 'no named components' for part in components)}."
        )
        if unused is None or not found:
            not_used.report(len(found))
    return found


def kronecker_only(
    updates: Mapping[Place, Update], components: Mapping[str, nn.Module], source: Path, unused: Unused
) -> dict[Place, KroneckerUpdate]:
    """Those of some updates that an adapter of ours can be; the others are noted as unused."""
    layers: dict[Place, KroneckerUpdate] = {}
    others: dict[tuple[str, bool], list[str]] = {}
    for (part, name), update in updates.items():
        label = in_component(part, name)
        if isinstance(update, KroneckerUpdate) and update.dora_scale is None:
            if update.bias is not None:
                reason = f"{source} changes biases, which no adapter of ours does"
                others.setdefault((reason, False), []).append(label)
            if update.num_terms <= FEW_TERMS or _pays(update):
                layers[part, name] = update
                continue
            reason = (
                f"{source} has layers that are rows of one product; in this model they would be sums of up to "
                f"{update.num_terms} products, which cost more than the whole weight"
            )
            others.setdefault((reason, True), []).append(label)
            continue
        approximable = has_delta(update) and not is_of_norm(update)
        others.setdefault((_no_product(update, source), approximable), []).append(label)
    for (reason, approximable), names in others.items():
        nearest = "; `diffusekrona convert --budget` finds the nearest Kronecker products" if approximable else ""
        unused.add(
            f"{reason} ({len(names)} of {len(updates)} layers: {few(names)}). merge_file(pipe, path) merges them into "
            f"the weights exactly{nearest}."
        )
    return layers


def has_delta(update: Update) -> bool:
    """Whether an update is the same for every weight, so that it can be approximated."""
    if isinstance(update, Assembled):
        return all(has_delta(piece) for piece, _ in update.pieces)
    return update.dora_scale is None and not isinstance(update, LibraryUpdate)


def is_of_norm(update: Update) -> bool:
    """Whether an update is for the weight of a norm, or for nothing but a bias."""
    return update.bias_only or (isinstance(update, Full) and update.diff is not None and update.diff.dim() == 1)


def _pays(update: KroneckerUpdate) -> bool:
    """Whether a sum of products takes fewer multiply-adds than the weight that it is added to."""
    shapes = update.shapes
    return update.num_terms * krona_multiply_adds(shapes, cheapest_order(shapes)) <= shapes.d * shapes.h


def as_krona(
    layers: Mapping[Place, KroneckerUpdate], components: Mapping[str, nn.Module], source: Path
) -> dict[str, SavedAdapter]:
    """The same updates as a KronA adapter of each component.

    Raises:
        AdapterFileError: layouts differ.
    """
    if len({layer.layout for layer in layers.values()}) > 1:
        raise AdapterFileError(f"{source} mixes LoKr with layers of the paper authors' layout, which is not supported.")
    return {
        part: _adapter({name: one for (of, name), one in layers.items() if of == part}, components[part], source)
        for part in dict.fromkeys(part for part, _ in layers)
    }


def _no_product(update: Update, source: Path) -> str:
    if isinstance(update, Assembled):
        for piece, _ in update.pieces:
            if not isinstance(piece, KroneckerUpdate) or piece.dora_scale is not None:
                return _no_product(piece, source)
        return f"{source} has products of other shapes for parts of what is one layer in this model"
    if update.bias_only:
        return f"{source} changes biases, which no adapter of ours does"
    if isinstance(update, LibraryUpdate) and update.kind == "lora":
        return f"{source} holds LoRA updates from PiSSA or OLoRA, which count from other weights than the base's"
    if isinstance(update, LibraryUpdate):
        return f"{source} holds {update.kind} updates, which multiply the base's weights"
    if update.dora_scale is not None:
        return f"{source} holds DoRA updates, which depend on the base's weights"
    if is_of_norm(update):
        return f"{source} changes norms, which no adapter of ours does"
    kind = {"lora": "LoRA", "loha": "LoHa"}.get(update.kind, "whole")
    return f"{source} holds {kind} updates, which are no Kronecker products, so they cannot become an adapter exactly"


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
    try:
        layers = target_layers(component, saved.config)
    except ConfigError as error:
        raise AdapterFileError(
            f"{saved.source} holds a config that does not work with this {type(component).__name__}, which is "
            f"unchanged: {error}"
        ) from error
    for name, layer in layers.items():
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
    num_terms, terms_pattern = common_and_pattern({name: layer.num_terms for name, layer in layers.items()})
    config = KronAConfig(
        a1=a1,
        a2=a2,
        alpha=alpha,
        num_terms=num_terms,
        b_rank=b_rank,
        layout=next(iter(layers.values())).layout,
        factor_pattern=factor_pattern,
        alpha_pattern=alpha_pattern,
        terms_pattern=terms_pattern,
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
