"""What a safetensors file is: an adapter of any program, its layers, what can be done with it; or something else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..errors import AdapterFileError
from ..kron.shapes import stacked
from ..storage import TensorFile
from ..tuner.names import in_component, layer_of
from .formats import foreign
from .formats import krona as krona_format
from .formats.krona import SavedAdapter
from .formats.library import LibraryUpdate
from .formats.loha import LoHa
from .formats.lora import LoRA
from .formats.updates import LARGEST_PRODUCT, KroneckerUpdate, Update, flat
from .kronecker import krona_update
from .provenance import KNOWN_OTHERS, made_by, made_for_model, naming_of, not_an_adapter
from .read import are_ours, opened
from .unused import Unused
from .write import check_fits

METHODS = {
    "krona": "KronA",
    "lokr": "LoKr",
    "lora": "LoRA",
    "loha": "LoHa",
    "full": "whole updates",
    "reference": "DiffuseKronA, by the paper's authors",
    "oft": "OFT",
    "diag-oft": "Diag-OFT",
    "boft": "BOFT",
    "glora": "GLoRA",
    "ia3": "(IA)³",
    "mixed": "several methods",
    "none": "no adapter",
}


@dataclass(frozen=True)
class LayerInspection:
    """One layer of an adapter file.

    Attributes:
        name: as the file writes it.
        kind: the method.
        size: d × h of its update, a convolution's with the kernel in h; None where the file does not tell it.
        shapes: of what the file holds, such as "4 × 64 ⊗ 320 × 20".
        parameters: how many numbers that is.
        rank: that the update has, or at most has where it is a sum or an elementwise product; None where it depends
            on the weight.
        norm: ‖ΔW‖, the Frobenius norm, at the scale in the file; before DoRA. NaN where it depends on the weight.
    """

    name: str
    kind: str
    size: tuple[int, int] | None
    shapes: str
    parameters: int
    rank: int | None
    norm: float


@dataclass(frozen=True)
class Inspection:
    """A safetensors file.

    Attributes:
        kind: its method; "mixed", or "none" if it is no adapter.
        layers: in the file's order.
        metadata: its header.
        becomes: what can be done with it, and how; sentences without a full stop.
        naming: whose names its layers have, or what the file is if it is no adapter.
        made_by: the program that wrote it; None if nothing tells.
        made_for: the model; None if nothing tells.
        unused: what of it cannot be used, and why.
    """

    kind: str
    layers: list[LayerInspection]
    metadata: dict[str, str]
    becomes: list[str]
    naming: str = ""
    made_by: str | None = None
    made_for: str | None = None
    unused: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """In all."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def norm(self) -> float:
        """Of all updates together; NaN if some depend on the weight."""
        return math.hypot(*(layer.norm for layer in self.layers))

    def table(self, every_layer: bool = False) -> Table:
        """The layers as a rich table, one row for each or for each kind of layer."""
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for header in (
            "layer" if every_layer else "layers",
            "method",
            "d × h",
            "factors",
            "parameters",
            "rank",
            "norm",
        ):
            table.add_column(header, justify="right", no_wrap=not every_layer)
        rows: dict[object, list[LayerInspection]] = {}
        for layer in self.layers:
            rows.setdefault(layer.name if every_layer else (layer.kind, layer.size, layer.shapes), []).append(layer)
        for alike in rows.values():
            layer = alike[0]
            table.add_row(
                escape(layer.name) if every_layer else str(len(alike)),
                METHODS[layer.kind],
                "–" if layer.size is None else f"{layer.size[0]} × {layer.size[1]}",
                layer.shapes,
                f"{sum(one.parameters for one in alike):,}",
                _range(f"{rank}" for rank in sorted(one.rank for one in alike if one.rank is not None)),
                _range(f"{norm:.3g}" for norm in sorted(one.norm for one in alike if not math.isnan(one.norm))),
            )
        return table


def inspect_file(path: Path) -> Inspection:
    """What a safetensors file, or an adapter's folder, is; no model is needed.

    Raises:
        AdapterFileError: it cannot be read, or is damaged so that nothing can be said of it.
    """
    files = opened(path)
    if are_ours(files):
        adapters = krona_format.read(files)
        names = [in_component(part, name) for part, saved in adapters.items() for name in map(layer_of, saved.tensors)]
        return Inspection(
            "krona",
            _ours(adapters, path),
            {},
            _ours_become(adapters),
            "diffusekrona's names",
            made_by="diffusekrona",
            made_for=made_for_model(names),
        )
    return _foreign(files, path)


def _foreign(files: Mapping[str, TensorFile], path: Path) -> Inspection:
    unused = Unused(str(path))
    updates = {
        in_component(part, name): update
        for part, file in files.items()
        for name, update in foreign.read(file, unused=unused).items()
    }
    metadata = {key: value for file in files.values() for key, value in file.metadata.items()}
    if not updates:
        shapes = {name: tuple(tensor.shape) for file in files.values() for name, tensor in file.tensors.items()}
        what, model = not_an_adapter(shapes)
        damaged = [] if what.startswith(tuple(KNOWN_OTHERS)) else unused.reasons
        return Inspection("none", [], metadata, [], what, made_by(metadata, []), model, damaged)
    kinds = {update.kind for update in updates.values()}
    layers, usable = [], []
    for name, update in updates.items():
        try:
            layers.append(_layer(name, update))
            usable.append(update)
        except AdapterFileError as error:
            unused.add(str(error))
    return Inspection(
        kinds.pop() if len(kinds) == 1 else "mixed",
        layers,
        metadata,
        _becomes(usable) if usable else [],
        naming_of(updates),
        made_by(metadata, list(updates)),
        made_for_model(updates),
        unused.reasons,
    )


def _ours(adapters: Mapping[str, SavedAdapter], path: Path) -> list[LayerInspection]:
    layers = []
    for part, saved in adapters.items():
        names = [name for name in dict.fromkeys(map(layer_of, saved.tensors)) if name]
        layers += [_layer(in_component(part, name), krona_update(name, saved)) for name in names]
    if not layers:
        raise AdapterFileError(f"{path} holds no factors.")
    return layers


_MERGED = "merged weights, exactly (diffusekrona merge)"
_NEAREST = "KronA, LoKr: the nearest Kronecker products (diffusekrona convert --factors or --budget)"
_EXACT = "KronA, LoKr: exactly (load_krona, diffusekrona convert)"


def _becomes(updates: list[Update]) -> list[str]:
    """What a file of another program can be converted to, and how many of its layers."""
    exact = [update for update in updates if isinstance(update, KroneckerUpdate) and update.dora_scale is None]
    approximable = [update for update in updates if update.has_delta and not update.of_norm]
    found = []
    if exact:
        found.append(_of(_EXACT if exact[0].layout == "kron" else "KronA: exactly (load_krona)", exact, updates))
    if len(approximable) > len(exact) or (exact and exact[0].layout != "kron"):
        found.append(_of(_NEAREST, approximable, updates))
    return [*found, _MERGED]


def _of(what: str, usable: Sized, updates: Sized) -> str:
    return what if len(usable) == len(updates) else f"{what}, {len(usable)} of {len(updates)} layers"


def _ours_become(adapters: Mapping[str, SavedAdapter]) -> list[str]:
    if any(saved.config.modules_to_save for saved in adapters.values()):
        return ["KronA: exactly (load_krona)"]
    try:
        for saved in adapters.values():
            check_fits(saved)
        one_product = all(saved.config.num_terms == 1 and not saved.config.terms_pattern for saved in adapters.values())
    except AdapterFileError:
        one_product = False
    return [_EXACT, _MERGED] if one_product else ["KronA: exactly (load_krona)", _NEAREST, _MERGED]


def _layer(name: str, update: Update) -> LayerInspection:
    size, shapes, rank, norm = _described(update)
    if not isinstance(update, LibraryUpdate) and not math.isfinite(norm):
        raise AdapterFileError(f"{update.where} is an update with an infinity or a NaN, though its factors have none.")
    return LayerInspection(name, update.kind, size, shapes, update.parameters, rank, norm)


def _described(update: Update) -> tuple[tuple[int, int] | None, str, int | None, float]:
    """Size, shapes, rank and norm, without building ΔW where the factors tell them."""
    if isinstance(update, LibraryUpdate):
        return None, update.shapes, None, math.nan
    if isinstance(update, KroneckerUpdate):
        return _of_terms(update)
    if update.bias_only:
        assert update.bias is not None
        return (len(update.bias), 1), "bias", None, float(update.bias.norm())
    if isinstance(update, LoRA) and update.mid is None:
        return _of_lora(update.up, update.down, update.scale)
    if isinstance(update, LoHa) and update.cores is None:
        return _of_loha(update)
    assert update.shape is not None
    if update.shape.numel() > max(LARGEST_PRODUCT, update.parameters):
        raise AdapterFileError(
            f"{update.where} is an update of {' × '.join(map(str, update.shape))}, larger than any convolution's: the "
            "file is damaged, or made to do harm."
        )
    delta = _finite(flat(update.delta().double()), update)
    shapes = f"rank {update.w1_b.shape[0]} ∘ {update.w2_b.shape[0]}" if isinstance(update, LoHa) else "whole"
    return (delta.shape[0], delta.shape[1]), shapes, int(_ranks(delta)), float(delta.norm())


def _finite(tensor: Tensor, update: Update) -> Tensor:
    """A product of factors, which may be out of range though they are not."""
    if not bool(tensor.isfinite().all()):
        raise AdapterFileError(f"{update.where} gives an infinity or a NaN: its training failed, or it is damaged.")
    return tensor


def _of_lora(up: Tensor, down: Tensor, scale: float) -> tuple[tuple[int, int], str, int, float]:
    up, down = flat(up.double()), flat(down.double())
    square = abs(float((up.T @ up * (down @ down.T)).sum()))
    size, rank = (len(up), down.shape[1]), int(_ranks_of_products(up, down))
    return size, f"rank {up.shape[1]}", rank, abs(scale) * math.sqrt(square)


def _of_loha(update: LoHa) -> tuple[tuple[int, int], str, int, float]:
    """The norm some rows at a time or by products of columns, and the highest rank that the elementwise product has."""
    a1, b1, a2, b2 = (factor.double() for factor in (update.w1_a, update.w1_b, update.w2_a, update.w2_b))
    (d, r1), (r2, h) = a1.shape, b2.shape
    if (d + h) * (r1 * r2) ** 2 < d * h * (r1 + r2):
        left, right = _paired(a1, a2), _paired(b1.T, b2.T)
        square = abs(float((left.T @ left * (right.T @ right)).sum()))
    else:
        step = max(1, LARGEST_PRODUCT // (64 * h))
        square = sum(
            float(((a1[i : i + step] @ b1) * (a2[i : i + step] @ b2)).square().sum()) for i in range(0, d, step)
        )
    rank = int(_ranks_of_products(a1, b1) * _ranks_of_products(a2, b2))
    return (d, h), f"rank {r1} ∘ {r2}", min(rank, d, h), abs(update.scale) * math.sqrt(square)


def _paired(one: Tensor, other: Tensor) -> Tensor:
    """Each row's products of an entry of one with an entry of the other."""
    return (one.unsqueeze(2) * other.unsqueeze(1)).flatten(1)


def _of_terms(update: KroneckerUpdate) -> tuple[tuple[int, int], str, int, float]:
    (a1, a2, b1, b2), (d, h) = update.shapes, (update.shapes.d, update.shapes.h)
    A = stacked(_finite(update.A, update)).double()
    of_B, square = _of_product(A, *update.b_parts) if update.b_parts else _of_factors(A, update)
    rank = min(int((_ranks(A) * of_B).sum()), d, h)
    count = f"{update.num_terms} terms " if update.num_terms > 1 else ""
    return (d, h), f"{count}{a1} × {a2} ⊗ {b1} × {b2}", rank, abs(update.scale) * math.sqrt(square)


def _of_factors(A: Tensor, update: KroneckerUpdate) -> tuple[Tensor, float]:
    """Each B's rank, and ‖Σ A ⊗ B‖²."""
    B = stacked(_finite(update.B, update)).double()
    a, b = A.flatten(1), B.flatten(1)
    # ⟨A ⊗ B, C ⊗ D⟩ = ⟨A, C⟩·⟨B, D⟩, and Σ A ⊗ B has the numbers of Σ vec(A) vec(B)ᵀ, for very many terms.
    few = len(a) <= max(a.shape[1], b.shape[1])
    return _ranks(B), abs(float((a @ a.T * (b @ b.T)).sum() if few else (a.T @ b).square().sum()))


def _of_product(A: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, float]:
    """The rank of B = left · right, and ‖A ⊗ B‖²; B is not built."""
    left, right = left.double(), right.double()
    square = (left.T @ left * (right @ right.T)).sum() * A.square().sum()
    return _ranks_of_products(left, right), abs(float(square))


def _ranks(matrices: Tensor, longest: int | None = None) -> Tensor:
    """Of one matrix or several, in fp32, as if their longest side were another."""
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    scaled = (matrices / largest.where(largest > 0, 1.0)).float()
    tolerance = (longest or max(scaled.shape[-2:])) * torch.finfo(scaled.dtype).eps
    ranks: Tensor = torch.linalg.matrix_rank(scaled, rtol=tolerance)
    return ranks


def _ranks_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Of left · right, which is not built: what triangular matrices are left of both, when they are turned, tells."""
    core = torch.linalg.qr(left.double(), "r").R @ torch.linalg.qr(right.double().mT, "r").R.mT
    return _ranks(core, max(left.shape[-2], right.shape[-1]))


def _range(values: Iterable[str]) -> str:
    first, *rest = dict.fromkeys(values) or ["–"]
    return f"{first}–{rest[-1]}" if rest else first
