"""Other programs' adapter files as KronA adapters of a model's layers: exactly the same function, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..errors import AdapterFileError
from ..kron.shapes import FactorShapes, Layout, update_shapes
from ..tuner.config import KronAConfig
from ..tuner.targets import common_and_pattern, target_only
from .formats import krona as krona_format
from .formats.krona import SavedAdapter
from .formats.lokr import LoKr
from .formats.reference import Reference
from .formats.updates import Update, flat
from .saved import Place, by_component, foreign_updates


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
