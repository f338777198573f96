"""What an adapter file says about one layer: the base of all kinds of update, and the checks that they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ...errors import AdapterFileError
from ...kron.products import dense_update
from ...kron.shapes import FactorShapes, Layout, stacked, terms_of
from .scales import Scales

LARGEST_UPDATE = 1 << 30
"""Numbers of ΔW in one layer; the embeddings of a language model's 262,144 words have a billion."""

LARGEST_PRODUCT = 1 << 27
"""Numbers of a factor that the file holds as a product, which is built while it is read."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Update(ABC):
    """The update ΔW of one layer's weight W, as another program's file holds it.

    Attributes:
        kind: the method: "krona", "lokr", "lora", "loha", "full" or "reference".
        where: the file and the layer, for errors.
        parameters: how many numbers the file holds for it, alpha not counted.
        dora_scale: DoRA's magnitudes m, one per output (d × 1 …) or one per input (1 × h …); None without DoRA.
        bias: what the layer's bias changes by, in fp32; None if it stays.
    """

    kind: str = ""
    where: str = field(default="The update", repr=False)
    parameters: int = 0
    dora_scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def bias_only(self) -> bool:
        """Whether the weight stays as it is."""
        return False

    @property
    def of_norm(self) -> bool:
        """Whether it is for the weight of a norm, or for nothing but a bias."""
        return self.bias_only

    @property
    def has_delta(self) -> bool:
        """Whether ΔW is the same for every weight, so that it can be approximated."""
        return self.dora_scale is None

    @property
    def shape(self) -> torch.Size | None:
        """Of ΔW as `delta` gives it; None where that depends on the weight."""
        return None

    def check_size(self) -> None:
        """Raise `AdapterFileError` if ΔW is larger than any weight, though its factors are small."""
        if self.shape is not None and self.shape.numel() > LARGEST_UPDATE:
            raise AdapterFileError(
                f"{self.where} is an update of {by(self.shape)}, larger than any weight: the file is damaged, or made "
                "to do harm."
            )

    @abstractmethod
    def delta(self) -> Tensor:
        """ΔW in fp32 and before DoRA: d × h, or for a convolution d × h × kernel, which may be flat, d × (h·kernel)."""

    def change(self, weight: Tensor) -> Tensor:
        """W' − W in fp32 and in W's shape: ΔW itself, or with DoRA m · (W + ΔW) / ‖W + ΔW‖ − W.

        The norms are those of the rows of W + ΔW where m has one entry per output, else those of its columns
        (LyCORIS' `weight_decompose`; PEFT's DoRA knows the rows only).

        Raises:
            AdapterFileError: the update was made for a weight of another shape.
        """
        if self.shape is not None and not _fits(self.shape, weight.shape):
            raise AdapterFileError(
                f"{self.where} was made for a weight of {by(self.shape)}, but the one here is {by(weight.shape)}; "
                "the file is for another model."
            )
        delta = self.delta().to(weight.device).reshape(weight.shape)
        if self.dora_scale is None:
            return delta
        original = weight.detach().float()
        return _decomposed(original + delta, self.dora_scale.to(weight.device), self.where) - original

    def change_of_bias(self, bias: Tensor) -> Tensor:
        """What a layer's bias changes by, in fp32.

        Raises:
            AdapterFileError: the update was made for a bias of another length.
        """
        assert self.bias is not None
        if self.bias.numel() != bias.numel():
            raise AdapterFileError(
                f"{self.where} was made for a bias of {self.bias.numel()}, but the one here has {bias.numel()}; the "
                "file is for another model."
            )
        return self.bias.to(bias.device).reshape(bias.shape)

    def check_layer(self, layer: nn.Module) -> None:  # noqa: B027  (most have nothing to check)
        """Raise `AdapterFileError` if the layer would have to change in more than its weight."""


@dataclass(frozen=True, eq=False)
class KroneckerUpdate(Update):
    """ΔW = s · Σ A_r ⊗ B_r, which an adapter of ours can be as it is: of our own files, LoKr's and the paper authors'.

    Attributes:
        A: a1 × a2, or terms × a1 × a2, fp32.
        held_b: B, which is b1 × b2, a convolution's with the kernel in its columns, or terms × b1 × b2; or B1 (b1 × ρ)
            and B2 (ρ × b2), whose product it is, if the file holds it so; fp32.
        scale: s.
        layout: the order of the outputs, see `KronAConfig`.
    """

    A: Tensor
    held_b: Tensor | tuple[Tensor, Tensor]
    scale: float = 1.0
    layout: Layout = "kron"

    @property
    def b_parts(self) -> tuple[Tensor, Tensor] | None:
        """B1 and B2, if the file holds B as their product."""
        return None if isinstance(self.held_b, Tensor) else self.held_b

    @property
    def B(self) -> Tensor:
        """B, multiplied out each time it is asked for, since a small file may hold a large one as a product."""
        return self.held_b if isinstance(self.held_b, Tensor) else self.held_b[0] @ self.held_b[1]

    @property
    def shapes(self) -> FactorShapes:
        """Of A and B, a convolution's kernel counted in b2."""
        (a1, a2), held = self.A.shape[-2:], self.held_b
        if isinstance(held, Tensor):
            return FactorShapes(a1, a2, *held.shape[-2:])
        return FactorShapes(a1, a2, held[0].shape[0], held[1].shape[1])

    @property
    def num_terms(self) -> int:
        """How many products are summed."""
        return len(stacked(self.A))

    @property
    def shape(self) -> torch.Size:
        """d × h."""
        return torch.Size((self.shapes.d, self.shapes.h))

    def delta(self) -> Tensor:
        """ΔW in fp32, d × h, a convolution's with the kernel in h."""
        return dense_update(terms_of(self.scale * self.A, self.B), self.layout)


class Common(TypedDict):
    """What every kind of update has."""

    where: str
    parameters: int
    dora_scale: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class LayerTensors:
    """The tensors that a file holds for one layer, by part, such as "w1" or "alpha".

    Attributes:
        where: the file and the layer, for errors.
        name: the layer, as the file writes it.
        parts: part → tensor.
        scales: what the file's header says about the layers' scales; None if it says nothing.
    """

    where: str
    name: str
    parts: Mapping[str, Tensor]
    scales: Scales | None = None

    @property
    def peft_config(self) -> Mapping[str, Any] | None:
        """PEFT's config that is for this layer, from the file's header; None if there is none."""
        found = None if self.scales is None else self.scales.of_layer(self.name)
        return None if found is None else found[1]

    def common(self) -> Common:
        """The fields that every kind of update has.

        Raises:
            AdapterFileError: a tensor is not of floating-point numbers, or holds an infinity or a NaN.
        """
        for part, tensor in self.parts.items():
            if part == "alpha":  # which may be of any dtype, and infinite where it means nothing
                continue
            if not tensor.is_floating_point():
                raise self.error(f"holds {part} as {tensor.dtype}, where floating-point numbers are expected")
            if not bool(torch.isfinite(tensor.float()).all()):
                raise self.error(f"holds an infinity or a NaN in {part}: its training failed, or the file is damaged")
        parameters = sum(tensor.numel() for part, tensor in self.parts.items() if part != "alpha")
        bias = self.parts.get("bias")
        return {
            "where": self.where,
            "parameters": parameters,
            "dora_scale": self._dora_scale(),
            "bias": None if bias is None else bias.float().flatten(),
        }

    def matrix(self, part: str, dims: tuple[int, ...] = (2,)) -> Tensor:
        """A part that must be there, in fp32, with one of so many dimensions, none of them empty."""
        tensor = self.parts.get(part)
        if tensor is None:
            raise self.error(f"lacks {part}: it has only {', '.join(sorted(self.parts))}")
        if tensor.dim() not in dims or not tensor.numel():
            wanted = " or ".join(map(str, dims))
            raise self.error(f"holds {part} of shape {by(tensor.shape)}, where {wanted} dimensions are expected")
        return tensor.float().contiguous()

    def check_product(self, *sizes: int, most: int = LARGEST_PRODUCT) -> None:
        """Raise an error if a product of parts, small as they are, would be larger than any factor."""
        if math.prod(sizes) > most:
            raise self.error(
                f"holds a product of {' × '.join(map(str, sizes))}, larger than any factor: the file is damaged, or "
                "made to do harm"
            )

    def scale(self, rank: int | None) -> float:
        """The factor of the update: alpha / rank, or what else the file's header says; see `scales`.

        Args:
            rank: the rank of the layer's decomposed factors; None for whole ones.
        """
        alpha = self.parts.get("alpha")
        scales = self.scales or Scales("The file")
        if alpha is None:
            return scales.of(self.name, rank)
        if alpha.numel() != 1:
            raise self.error(f"holds an alpha of shape {by(alpha.shape)}, where one number is expected")
        if rank is not None and not math.isfinite(float(alpha)):
            raise self.error(f"holds {float(alpha)} as its alpha: its training failed, or the file is damaged")
        return scales.of(self.name, rank, float(alpha))

    def error(self, text: str) -> AdapterFileError:
        """An error about this layer: the text follows the file's and the layer's name."""
        return AdapterFileError(f"{self.where} {text}.")

    def check(self, fits: bool, *parts: str) -> None:
        """Raise an error that names the shapes of the parts, unless they fit each other."""
        if not fits:
            shapes = ", ".join(f"{part} of {by(self.parts[part].shape)}" for part in parts if part in self.parts)
            raise self.error(f"holds {shapes}, which do not fit each other; the file is damaged")

    def _dora_scale(self) -> Tensor | None:
        if "magnitude" in self.parts:
            # PEFT's has one entry per output, as a vector or, for a convolution, as 1 × d × 1 × 1.
            magnitude = self.parts["magnitude"].float()
            self.check(magnitude.dim() > 0, "magnitude")
            return magnitude.unsqueeze(-1) if magnitude.dim() == 1 else magnitude.transpose(0, 1)
        scale = self.parts.get("dora_scale")
        return None if scale is None else scale.float()


def _fits(delta: torch.Size, weight: torch.Size) -> bool:
    if len(delta) == 2 and len(weight) > 2:
        return delta[0] == weight[0] and delta.numel() == weight.numel()
    return delta.numel() == weight.numel() and delta[:2] == weight[:2]


def _decomposed(direction: Tensor, magnitude: Tensor, where: str) -> Tensor:
    """m · V / ‖V‖ with the norms of V's rows or columns, whichever m counts."""
    d, h = direction.shape[:2]
    per_output = magnitude.shape[:1] == (d,) and magnitude.numel() == d
    if not per_output and not (magnitude.shape[1:2] == (h,) and magnitude.numel() == h):
        raise AdapterFileError(
            f"{where} holds DoRA magnitudes of {by(magnitude.shape)}, which fit neither the {d} outputs nor the {h} "
            f"inputs of the weight of {by(direction.shape)}; the file is for another model."
        )
    kept = 0 if per_output else 1
    norm: Tensor = torch.linalg.vector_norm(
        direction, dim=[i for i in range(direction.dim()) if i != kept], keepdim=True
    )
    # A row of zeros stays one.
    return direction * (magnitude.reshape(norm.shape) / norm.clamp_min(torch.finfo(norm.dtype).tiny))


def by(shape: Iterable[int]) -> str:
    """A shape in words."""
    return " × ".join(map(str, shape)) or "a single number"


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ core[i, j, …] · left[i, p] · right[j, r]: p × r × kernel, of a core of i × j × kernel."""
    # torch.kron cannot take every layout that einsum gives.
    return torch.einsum("ij...,ip,jr->pr...", core, left, right).contiguous()


def flat(tensor: Tensor) -> Tensor:
    """All dimensions after the first as one."""
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
