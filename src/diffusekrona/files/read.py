"""What adapter files, our own and other programs', say about each layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import AdapterFileError, FactorShapeError
from ..kron.products import dense_update
from ..kron.shapes import FactorShapes, Layout, update_shapes
from ..tuner.components import is_denoiser
from ..tuner.config import KronAConfig
from ..tuner.model import KronAModel
from ..tuner.targets import common_and_pattern, layer_alpha, layer_shapes, target_layers, target_only
from .formats import foreign
from .formats import krona as krona_format
from .formats.krona import SavedAdapter
from .formats.lokr import LoKr
from .formats.reference import Reference
from .formats.updates import Update, flat
from .naming import resolve

Place = tuple[str, str]
"""Component and name of a layer."""


def updates_in(source: Path, components: Mapping[str, nn.Module]) -> dict[Place, Update]:
    """Every layer's update in any adapter file or folder.

    Raises:
        AdapterFileError: it cannot be read, does not fit these models, or holds more than updates of layers.
    """
    files = krona_format.foreign_files(source)
    return foreign_updates(files, components) if files else krona_updates(source, components)


def foreign_updates(files: Mapping[str, Path], components: Mapping[str, nn.Module]) -> dict[Place, Update]:
    """What other programs' files say about each layer of a model.

    Args:
        files: by component, "" for one that names its components itself, as `formats.krona.foreign_files` finds them.
        components: the model's.

    Raises:
        AdapterFileError: a file is damaged, or names layers that the model does not have.
    """
    updates: dict[Place, Update] = {}
    for part, file in files.items():
        found = foreign.read(file)
        places = resolve(found, {part: components[part]} if part in components and part else components, str(file))
        updates.update({places[key]: update for key, update in found.items()})
    return updates


def krona_updates(source: Path, components: Mapping[str, nn.Module]) -> dict[Place, Update]:
    """The layers' updates of an adapter that `save_krona`, PEFT or Diffusers saved.

    Raises:
        AdapterFileError: it cannot be read, does not fit these models, or holds more than updates of layers.
    """
    updates: dict[Place, Update] = {}
    for part, saved in by_component(krona_format.read(source), components, source).items():
        check_fit(components[part], saved)
        if saved.config.modules_to_save:
            raise AdapterFileError(
                f"{source} holds whole modules ({', '.join(saved.config.modules_to_save)}) beside its updates; load it "
                "with load_krona."
            )
        for name in target_layers(components[part], saved.config):
            updates[part, name] = KronaUpdate.of(name, saved)
    return updates


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


@dataclass(frozen=True, eq=False)
class KronaUpdate(Update):
    """ΔW = s · Σ A_r ⊗ B_r of one layer of our own files.

    Attributes:
        terms: (A, B) of each term, fp32, a convolution's B with the kernel in its columns.
        scale: s.
        layout: the order of the outputs.
    """

    kind: ClassVar[str] = "krona"
    terms: list[tuple[Tensor, Tensor]]
    scale: float
    layout: Layout = "kron"

    @classmethod
    def of(cls, name: str, saved: SavedAdapter) -> KronaUpdate:
        """The update of a layer in a saved adapter."""
        factors = {
            key: saved.tensors[f"{name}.krona_{key}"].float()
            for key in ("A", "B", "B1", "B2")
            if f"{name}.krona_{key}" in saved.tensors
        }
        if "A" not in factors or not factors.keys() & {"B", "B1"} or ("B1" in factors) != ("B2" in factors):
            raise AdapterFileError(f"{saved.source} has not all factors of the layer {name}.")
        A = factors["A"]
        B = factors["B"] if "B" in factors else torch.matmul(factors["B1"], factors["B2"])
        terms = [(A, B)] if A.dim() == 2 else list(zip(A.unbind(), B.unbind(), strict=True))
        parameters = sum(factor.numel() for factor in factors.values())
        scale = layer_alpha(saved.config, name)
        return cls(terms, scale, saved.config.layout, where=f"{saved.source}: the layer {name}", parameters=parameters)

    def delta(self) -> Tensor:
        """ΔW in fp32, d × h, a convolution's with the kernel in h."""
        return dense_update([(self.scale * A, B) for A, B in self.terms], self.layout)


def check_fit(component: nn.Module, saved: SavedAdapter) -> None:
    """Raise `AdapterFileError` unless an adapter has just the tensors that its config means in a component.

    The text says what is missing, unknown, misshapen or not finite, and where the file was read.
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
        expected.update({f"{name}.{KronAModel.prefix}{factor}": size for factor, size in shapes.tensors.items()})
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


def read_adapters(source: Path, components: Mapping[str, nn.Module]) -> dict[str, SavedAdapter]:
    """The KronA adapter of each component of a model that a file or folder of any program holds.

    Raises:
        AdapterFileError: it cannot be read or is for another model; or some update is no Kronecker product.
    """
    files = krona_format.foreign_files(source)
    if files:
        return as_krona(foreign_updates(files, components), components, source)
    return by_component(krona_format.read(source), components, source)


def as_krona(
    updates: Mapping[Place, Update], components: Mapping[str, nn.Module], source: Path
) -> dict[str, SavedAdapter]:
    """The same updates as a KronA adapter of each component.

    Raises:
        AdapterFileError: some update is no Kronecker product, or has DoRA's magnitudes.
    """
    layers = {place: _factors(update, source) for place, update in updates.items()}
    if len({layer.layout for layer in layers.values()}) > 1:
        raise AdapterFileError(f"{source} mixes LoKr with layers of the paper authors' layout, which is not supported.")
    return adapters_of(layers, components, source)


@dataclass(frozen=True)
class LayerFactors:
    """The update s · Σ A_r ⊗ B_r of one layer.

    Attributes:
        A: a1 × a2, or terms × a1 × a2.
        B: b1 × b2, a convolution's with the kernel in its columns; or terms × b1 × b2.
        b_parts: B1 and B2, whose product B is, if it is kept so.
        scale: s.
        layout: the order of the outputs.
    """

    A: Tensor
    B: Tensor
    b_parts: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0
    layout: Layout = "kron"

    @property
    def shapes(self) -> FactorShapes:
        """Of A and B, a convolution's kernel counted in b2."""
        return FactorShapes(*self.A.shape[-2:], *self.B.shape[-2:])

    @property
    def num_terms(self) -> int:
        """How many products are summed."""
        return len(self.A) if self.A.dim() == 3 else 1


def adapters_of(
    layers: Mapping[Place, LayerFactors], components: Mapping[str, nn.Module], source: Path
) -> dict[str, SavedAdapter]:
    """An adapter of each component that has these factors, all of one layout and of equally many terms."""
    return {
        part: _adapter({name: one for (of, name), one in layers.items() if of == part}, components[part], source)
        for part in dict.fromkeys(part for part, _ in layers)
    }


def _factors(update: Update, source: Path) -> LayerFactors:
    if update.dora_scale is None and isinstance(update, LoKr):
        A, B, scale = update.factors()
        parts = update.w2_parts
        return LayerFactors(A, flat(B), None if parts is None else (parts[0], flat(parts[1])), scale, "kron")
    if update.dora_scale is None and isinstance(update, Reference):
        A, B, scale = update.factors()
        return LayerFactors(A, B, None, scale, "transposed")
    kind = "DoRA" if update.dora_scale is not None else {"lora": "LoRA", "loha": "LoHa"}.get(update.kind, "whole")
    raise AdapterFileError(
        f"{source} holds {kind} updates, which are no Kronecker products, so they cannot become an adapter exactly. "
        "merge_file(pipe, path) merges them into the weights exactly; `diffusekrona convert` finds the nearest "
        "Kronecker products."
    )


def _adapter(layers: Mapping[str, LayerFactors], component: nn.Module, source: Path) -> SavedAdapter:
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
        tensors[f"{name}.krona_A"] = layer.A.contiguous()
        if b_rank is not None and layer.b_parts is not None:
            tensors[f"{name}.krona_B1"], tensors[f"{name}.krona_B2"] = (part.contiguous() for part in layer.b_parts)
        else:
            tensors[f"{name}.krona_B"] = layer.B.contiguous()
    return SavedAdapter(config, tensors, source)


def _common_b_rank(layers: Mapping[str, LayerFactors]) -> int | None:
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
