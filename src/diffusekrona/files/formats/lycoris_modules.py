"""Diag-OFT, BOFT, GLoRA and (IA)³ as LyCORIS writes them, and the OFT of kohya's scripts, computed by LyCORIS.

Diag-OFT   `<layer>.oft_blocks`, n × b × b: the entries Q − Qᵀ give rotations of n groups of b outputs.
BOFT       the same with m × n × b × b: m rotations, one after the other, of groups further and further apart.
           Both may have `<layer>.rescale`, d × 1 …, and `<layer>.alpha`, which is no scale but the constraint: ‖Q − Qᵀ‖
           is at most alpha · d; 0 for no constraint.
OFT        kohya's scripts', `oft_unet_….oft_blocks`: Diag-OFT with a constraint, and their own rule that n is fixed
           instead of b. Their layers of Flux that are several in Diffusers have one set of blocks for each,
           `.oft_blocks.0`, `.oft_blocks.1` …, constrained by the outputs of each.
GLoRA      W' = W + s · (W · a1 · a2 + b1 · b2), `<layer>.a1.weight` (h × r), `.a2.weight` (r × h), `.b1.weight` (d × r)
           and `.b2.weight` (r × h), s = alpha / r. Before LyCORIS 3, 1 and 2 were the other way round in a and in b.
(IA)³      W' = W · (1 + w), `<layer>.weight` with one w per input if `<layer>.on_input` is not 0, else one per output.
           The bias stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import AdapterFileError
from .library import LibraryUpdate, common, layer_around
from .updates import LayerTensors, by, flat

_BLOCKS = "oft_blocks"
OFT_PARTS = {f".{name}": name for name in (_BLOCKS, *(f"{_BLOCKS}.{number}" for number in range(4)), "rescale")}
GLORA_PARTS = {f".{part}.weight": part for part in ("a1", "a2", "b1", "b2")}
IA3_PARTS = {".on_input": "on_input", ".weight": "weight"}
"""End of a tensor's name → part."""

_KOHYA_OFT = "oft_unet_"


@dataclass(frozen=True, eq=False)
class _LycorisUpdate(LibraryUpdate):
    library: ClassVar[str] = "LyCORIS"

    def module(self, name: str) -> Any:
        """A module of LyCORIS, by its name in it.

        Raises:
            AdapterFileError: LyCORIS is not installed.
        """
        try:
            from lycoris import modules  # an extra, and takes seconds
            from lycoris.functional import boft, diag_oft
        except ImportError as error:
            raise AdapterFileError(
                f"{self.where} is of a method ({self.kind}) that LyCORIS computes, which cannot be imported ({error}): "
                "pip install 'diffusekrona[lycoris]'."
            ) from error
        return {"diag_oft": diag_oft, "boft": boft}.get(name) or getattr(modules, name)


@dataclass(frozen=True, eq=False)
class OFT(_LycorisUpdate):
    """W' = rescale · R · W, R a rotation of the outputs.

    Attributes:
        constraint: alpha.
    """

    constraint: float

    @property
    def sets(self) -> list[Tensor]:
        """Blocks of Diag-OFT, n × b × b, or BOFT, m × n × b × b; several for rows of W that follow each other."""
        return [tensor for part, tensor in self.tensors.items() if part.startswith(_BLOCKS)]

    @property
    def rows(self) -> list[int]:
        """How many outputs each set of blocks rotates."""
        return [blocks.shape[-3] * blocks.shape[-1] for blocks in self.sets]

    def of_rows(self, first: int, last: int) -> LibraryUpdate:
        """As `LibraryUpdate.of_rows`: those of some sets of blocks, since the constraint is on each as a whole."""
        ends = list(accumulate(self.rows, initial=0))
        if (first, last) == (0, ends[-1]):
            return self
        if first not in ends or last not in ends:
            return super().of_rows(first, last)
        chosen = dict(list(self.tensors.items())[ends.index(first) : ends.index(last)])
        return replace(self, tensors=chosen, parameters=sum(blocks.numel() for blocks in chosen.values()))

    def computed(self, weight: Tensor) -> Tensor:
        """The rotation less the identity, applied to each set's rows."""
        rows, rescale = self.rows, self.tensors.get("rescale")
        if sum(rows) != len(weight):
            raise self.misfit(f"with {sum(rows)} outputs", weight)
        if rescale is not None and rescale.shape != (len(weight), *(1 for _ in weight.shape[1:])):
            raise self.misfit(f"that a rescale of {by(rescale.shape)} fits", weight)
        functions = self.module("boft" if self.kind == "boft" else "diag_oft")
        return torch.cat(
            [
                functions.diff_weight(
                    own,
                    blocks.to(weight.device),
                    None if rescale is None else rescale.to(weight.device),
                    constraint=self.constraint * len(own),
                    backend="torch",  # of all ways, the one that computes in fp32 wherever the weight is
                )
                for own, blocks in zip(weight.split(rows), self.sets, strict=True)
            ]
        )


@dataclass(frozen=True, eq=False)
class GLoRA(_LycorisUpdate):
    """W' = W + scale · (W · a1 · a2 + b1 · b2), for the tensors in the order that LyCORIS has now.

    Attributes:
        scale: alpha / r.
    """

    scale: float

    def of_rows(self, first: int, last: int) -> LibraryUpdate:
        """As `LibraryUpdate.of_rows`."""
        return replace(self, tensors={**self.tensors, "b1": self.tensors["b1"][first:last]})

    def computed(self, weight: Tensor) -> Tensor:
        """The module's update, on the CPU: elsewhere LyCORIS picks kernels that round otherwise."""
        b1, b2 = self.tensors["b1"], self.tensors["b2"]
        if (len(b1), *b2.shape[1:]) != tuple(weight.shape):
            raise self.misfit(f"of {by([len(b1), *b2.shape[1:]])}", weight)
        module = self.module("GLoRAModule")("", layer_around(weight.cpu()), 1, len(b2))
        for part, tensor in self.tensors.items():
            getattr(module, part).weight.copy_(tensor)
        module.scale = self.scale
        change: Tensor = module.get_diff_weight()[0]
        return change.to(weight.device)


@dataclass(frozen=True, eq=False)
class IA3(_LycorisUpdate):
    """W' = W · (1 + w).

    Attributes:
        on_input: whether w has one entry per input; else it has one per output.
    """

    on_input: bool

    def of_rows(self, first: int, last: int) -> LibraryUpdate:
        """As `LibraryUpdate.of_rows`."""
        factors = self.tensors["weight"]
        return self if self.on_input else replace(self, tensors={"weight": factors.flatten()[first:last]})

    def computed(self, weight: Tensor) -> Tensor:
        """The module's update, on the CPU: elsewhere LyCORIS picks kernels that round otherwise."""
        factors = self.tensors["weight"]
        if factors.numel() != weight.shape[int(self.on_input)]:
            raise self.misfit(f"with {factors.numel()} {'inputs' if self.on_input else 'outputs'}", weight)
        module = self.module("IA3Module")("", layer_around(weight.cpu()), train_on_input=self.on_input)
        module.weight.copy_(factors.reshape(module.weight.shape))
        change: Tensor = module.get_diff_weight()[0]
        return change.to(weight.device)


def read_oft(layer: LayerTensors) -> OFT:
    """One layer of a file of Diag-OFT, BOFT or the OFT of kohya's scripts.

    Raises:
        AdapterFileError: a tensor is missing, not finite, or they do not fit each other; or kohya's OFT lacks its
            constraint.
    """
    names = sorted(part for part in layer.parts if part.startswith(_BLOCKS)) or [_BLOCKS]
    kohya = layer.name.startswith(_KOHYA_OFT) or names != [_BLOCKS]
    if names != [_BLOCKS] and names != [f"{_BLOCKS}.{number}" for number in range(len(names))]:
        raise layer.error(f"holds {', '.join(names)}, where one set of blocks or several in a row are expected")
    fields = common(layer)
    blocks = {name: layer.matrix(name, (3,) if kohya else (3, 4)) for name in names}
    for name, one in blocks.items():
        layer.check(one.shape[-1] == one.shape[-2] and (one.dim() == 3 or _is_butterfly(one)), name)
    constraint = _constraint(layer)
    if not 0 <= constraint < math.inf or (kohya and not constraint):
        raise layer.error(
            f"holds an alpha of {constraint:g}, or none, where its method has the constraint of the rotation, which is "
            + ("more than 0 in the OFT of kohya's scripts" if kohya else "0 or more")
        )
    kind = "oft" if kohya else "diag-oft" if blocks[_BLOCKS].dim() == 3 else "boft"
    if "rescale" in layer.parts:
        if kohya:
            raise layer.error("holds a rescale, which the OFT of kohya's scripts does not have")
        blocks["rescale"] = layer.matrix("rescale", (1, 2, 3, 4, 5))
    return OFT(blocks, constraint, kind=kind, **fields)


def read_glora(layer: LayerTensors) -> GLoRA:
    """One layer of a GLoRA file, in LyCORIS' order of today or in that before its version 3.

    Raises:
        AdapterFileError: a tensor is missing, not finite, or they do not fit each other.
    """
    fields = common(layer)
    names = ("a1", "a2", "b1", "b2")
    a1, a2, b1, b2 = (layer.matrix(name, (2, 3, 4, 5)) for name in names)
    today, before = _is_glora(a1, a2, b1, b2), _is_glora(a2, a1, b2, b1)
    layer.check(today or before, *names)
    if today and before:  # a layer with as many inputs as outputs, whose rank is the smaller of two numbers
        if len(a1) == a1.shape[1]:
            raise layer.error("holds square factors only, which do not tell which of them comes first")
        today = len(a1) > a1.shape[1]
    ordered = (a1, a2, b1, b2) if today else (a2, a1, b2, b1)
    return GLoRA(dict(zip(names, ordered, strict=True)), layer.scale(len(ordered[3])), kind="glora", **fields)


def read_ia3(layer: LayerTensors) -> IA3:
    """One layer of an (IA)³ file of LyCORIS.

    Raises:
        AdapterFileError: a tensor is missing, not finite or misshapen.
    """
    fields = common(layer, "on_input")
    factors, switch = layer.matrix("weight", (1, 2, 3, 4, 5)), layer.parts["on_input"]
    layer.check(max(factors.shape) == factors.numel(), "weight")
    layer.check(switch.numel() == 1, "on_input")
    return IA3({"weight": factors}, bool(switch.double().any()), kind="ia3", **fields)


def _constraint(layer: LayerTensors) -> float:
    """alpha; LyCORIS wrote none before it kept the constraint, and then rotated without."""
    alpha = layer.parts.get("alpha")
    if alpha is None:
        return 0.0
    layer.check(alpha.numel() == 1, "alpha")
    return float(alpha)


def _is_butterfly(blocks: Tensor) -> bool:
    """Whether groups that are twice as far apart with each rotation still fit into all outputs."""
    m, n, b, _ = blocks.shape
    return b % 2 == 0 and n % 2 ** (m - 1) == 0


def _is_glora(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> bool:
    """Whether the shapes are h × r, r × h, d × r and r × h × kernel, with ones for the kernel in the first three."""
    (h, r), d = a1.shape[:2], len(b1)
    matrices = flat(a1).shape == (h, r) and flat(a2).shape == (r, h) and flat(b1).shape == (d, r)
    return matrices and b2.shape[:2] == (r, h) and a1.dim() == a2.dim() == b1.dim() == b2.dim()
