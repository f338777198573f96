"""Adapter files of any program, opened once and checked against a model: as KronA adapters, or as layers' updates."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError, ConfigError, FactorShapeError
from ..storage import TensorFile, read_safetensors
from ..tuner.compat import BaseTunerLayer, ModulesToSaveWrapper
from ..tuner.layer import layer_size
from ..tuner.names import PREFIX, TEXT_ENCODERS, factor_name, is_denoiser, layer_of
from ..tuner.projections import in_use
from ..tuner.targets import layer_shapes, leave_out_ip_adapters, target_layers
from .formats import foreign
from .formats import krona as krona_format
from .formats.krona import HEADER, WEIGHTS_NAME, SavedAdapter
from .formats.updates import KroneckerUpdate, Update, by
from .kronecker import as_krona, krona_update, kronecker_only
from .layouts.layout import Place, outputs
from .layouts.names import Target, resolve
from .parts import Piece, assembled, cut
from .unused import STRICT, Reading, Unused

_OF_ENCODER = re.compile(r"(lora_te\d?_|text_encoders?(_\d)?\.)")
"""How the names of a text encoder's tensors begin in other programs' files."""


def read_adapters(
    source: Path,
    components: Mapping[str, nn.Module],
    reading: Reading = STRICT,
    wanted: Collection[str] | None = None,
) -> dict[str, SavedAdapter]:
    """The KronA adapter of each component of a model that a file or folder of any program holds.

    Args:
        source: the file or folder.
        components: the model's.
        reading: what to do about tensors that cannot be used, and where programs disagree.
        wanted: names of components, to read just what is for these; None for all.

    Raises:
        AdapterFileError: it cannot be read or does not fit this model; or some update is no Kronecker product.
    """
    files = opened(source)
    ours = are_ours(files)
    unused = Unused(str(source), reading.on_unused)
    if ours:
        adapters = _by_component(_only(wanted, krona_format.read(files), source), components, source, unused)
        unused.report(len({(part, layer_of(key)) for part, saved in adapters.items() for key in saved.tensors}))
    else:
        updates = _foreign_updates(_only_files(wanted, files, source), components, reading, unused)
        if wanted is not None:
            updates = {place: update for place, update in updates.items() if place[0] in wanted}
        layers = kronecker_only(updates, source, unused)
        unused.report(len(layers))
        adapters = as_krona(layers, components, source)
    for part, saved in adapters.items():
        check_fit(components[part], saved, numbers=ours)  # those of other programs' files are checked
    return adapters


def updates_in(
    source: Path,
    components: Mapping[str, nn.Module],
    reading: Reading = STRICT,
    files: dict[str, TensorFile] | None = None,
) -> dict[Place, Update]:
    """Every layer's update in any adapter file or folder.

    Args:
        source: the file or folder.
        components: the model's.
        reading: what to do about tensors that cannot be used, and where programs disagree.
        files: what `opened` gives for the source, where it has been opened already.

    Raises:
        AdapterFileError: it cannot be read, does not fit these models, or holds more than updates of layers.
    """
    files = files or opened(source)
    unused = Unused(str(source), reading.on_unused)
    pieces: dict[Place, list[Piece]] = {}
    if not are_ours(files):
        updates = _foreign_updates(files, components, reading, unused)
        unused.report(len(updates))
        return updates
    for part, saved in _by_component(krona_format.read(files), components, source, unused).items():
        check_fit(components[part], saved)
        if saved.config.modules_to_save:
            unused.add(
                f"{source} holds whole modules ({', '.join(saved.config.modules_to_save)}) beside its updates, which "
                "load_krona loads."
            )
        for name in target_layers(components[part], saved.config):
            place, piece = _as_called(name, krona_update(name, saved), components[part])
            pieces.setdefault((part, place), []).append(piece)
    unused.report(sum(map(len, pieces.values())))
    return _updates(pieces, components)


def _only(wanted: Collection[str] | None, found: dict[str, SavedAdapter], source: Path) -> dict[str, SavedAdapter]:
    if wanted is None or ("" in found and any(map(is_denoiser, wanted))):
        return found
    chosen = {part: saved for part, saved in found.items() if part in wanted}
    if not chosen:
        held = ", ".join(part or "a single model" for part in found)
        raise AdapterFileError(
            f"{source} holds an adapter for {held}, and none for {', '.join(sorted(wanted))}, as components asks."
        )
    return chosen


def _only_files(wanted: Collection[str] | None, files: dict[str, TensorFile], source: Path) -> dict[str, TensorFile]:
    """Without the text encoders' tensors, where none is wanted: a pipeline without them has no names for these."""
    if wanted is None:
        return files
    kept = {part: file for part, file in files.items() if not part or part in wanted}
    if not any(is_denoiser(part) for part in wanted):
        return kept
    encoders = not any(part in TEXT_ENCODERS for part in wanted)
    only = {
        part: TensorFile(
            file.path, {n: t for n, t in file.tensors.items() if not (encoders and _OF_ENCODER.match(n))}, file.metadata
        )
        for part, file in kept.items()
    }
    if not any(file.tensors for file in only.values()):
        raise AdapterFileError(f"{source} holds nothing for {', '.join(sorted(wanted))}, which components asks for.")
    return only


def opened(source: Path) -> dict[str, TensorFile]:
    """The files of an adapter by component, "" for one that names its components itself.

    A folder may hold PEFT's `adapter_model.safetensors`, itself or in a folder for each component, or one other file.

    Raises:
        AdapterFileError: nothing to read, a pickle, a damaged file, or a checkpoint of a training run.
    """
    return {part: _opened(path) for part, path in _files_of(source).items()}


def _opened(path: Path) -> TensorFile:
    tensors, metadata = read_safetensors(path)
    if {"run", "sha256"} <= metadata.keys():
        raise AdapterFileError(
            f"{path} is a checkpoint of a run, from which it goes on. `diffusekrona export {shlex.quote(str(path))} "
            "OUTPUT` makes an adapter of it."
        )
    return TensorFile(path, tensors, metadata)


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


def _foreign_updates(
    files: Mapping[str, TensorFile], components: Mapping[str, nn.Module], reading: Reading, unused: Unused
) -> dict[Place, Update]:
    """What other programs' files say about each layer of a model; what does not fit it is unused."""
    pieces: dict[Place, list[Piece]] = {}
    for part, file in files.items():
        found = foreign.read(file, reading, unused)
        known = {part: components[part]} if part and part in components else components
        targets = resolve(found, known, str(file.path), unused)
        for key, target in targets.items():
            for place, piece in _pieces(found[key], target, components):
                pieces.setdefault(place, []).append(piece)
    return _updates(pieces, components)


def _updates(pieces: Mapping[Place, list[Piece]], components: Mapping[str, nn.Module]) -> dict[Place, Update]:
    updates: dict[Place, Update] = {}
    for (part, name), own in pieces.items():
        layer = components[part].get_submodule(name)
        update = assembled(own, outputs(layer)) if len(own) > 1 or own[0].into else own[0].update
        update.check_layer(layer)
        updates[part, name] = update
    return updates


def _as_called(name: str, update: Update, component: nn.Module) -> tuple[str, Piece]:
    """Where a layer's update goes in the weights: into the fused projection, where the model calls that instead."""
    found = in_use(component, name)
    if found is None:
        return name, Piece(update)
    whole, first = found
    return whole, Piece(update, (first, first + outputs(component.get_submodule(name))))


def _pieces(update: Update, target: Target, components: Mapping[str, nn.Module]) -> Iterator[tuple[Place, Piece]]:
    """Where a file's layer goes: whole into a module, or its rows into several."""
    if isinstance(update, KroneckerUpdate) and update.b_parts is not None:
        for part in target.parts:
            _check_inputs(update, components[target.component].get_submodule(part.module))
    rows = [part.rows for part in target.parts if part.rows]
    of_file = max((last for _, last in rows), default=0)
    for part in target.parts:
        own = update if part.rows is None else cut(update, part.rows, of_file)
        yield (target.component, part.module), Piece(own, part.into)


def _check_inputs(update: KroneckerUpdate, layer: nn.Module) -> None:
    """Raise `AdapterFileError` unless the layer has the update's inputs; before B, held as a product, is built."""
    try:
        _, inputs, kernel = layer_size(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer)
    except FactorShapeError:
        return  # which is said where the update is used
    if update.shapes.h != inputs * math.prod(kernel):
        raise AdapterFileError(
            f"{update.where} was made for {update.shapes.h} inputs, but the layer here has "
            f"{inputs * math.prod(kernel)}; the file is for another model."
        )


def _by_component(
    saved: dict[str, SavedAdapter], components: Mapping[str, nn.Module], source: Path, unused: Unused
) -> dict[str, SavedAdapter]:
    """The adapters of a file of ours by the components of a model that they are for; those of others are unused.

    A single module's adapter fits a pipeline's denoiser, and the denoiser's a single module.

    Raises:
        AdapterFileError: the model lacks all of them.
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
        unused.add(
            f"{source} holds an adapter for {', '.join(sorted(saved))}, but this model has "
            f"{', '.join(part or 'no named components' for part in components)}." + _way_out(saved, components)
        )
        if not found:
            unused.report(0)
    for part, adapter in found.items():
        with _about(adapter, components[part]):
            leave_out_ip_adapters(adapter.config, components[part], {layer_of(key) for key in adapter.tensors})
    return found


def _way_out(saved: Mapping[str, SavedAdapter], components: Mapping[str, nn.Module]) -> str:
    """What to do where a pipeline lacks some of the components that a file is for."""
    shared = [part for part in components if part in saved and part]
    return f" To load what is for it alone: load_krona(pipe, path, components={shared!r})." if shared else ""


@contextmanager
def _about(saved: SavedAdapter, component: nn.Module) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise AdapterFileError(
            f"{saved.source} holds a config that does not work with this {type(component).__name__}, which is "
            f"unchanged: {error}"
        ) from error


def check_fit(component: nn.Module, saved: SavedAdapter, numbers: bool = True) -> None:
    """Raise `AdapterFileError` unless an adapter has just the tensors that its config means in a component.

    The text says what is missing, unknown, misshapen or, where `numbers` asks for it, not finite, and where the file
    was read.
    """
    factors = _expected_factors(component, saved)
    expected = {**factors, **_expected_copies(component, saved)}
    present = {key: tuple(tensor.shape) for key, tensor in saved.tensors.items()}
    misshapen = [
        f"{key} is {by(present[key])}, not {by(shape)}"
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
    with _about(saved, component):
        layers = target_layers(component, saved.config)
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
