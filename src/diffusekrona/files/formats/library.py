"""Updates of methods that multiply the weight, whose change a library's own module computes: what they share.

LyCORIS' are in `lycoris_modules`, PEFT's in `peft_modules`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...errors import AdapterFileError
from .updates import Common, LayerTensors, Update, by

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


@dataclass(frozen=True, eq=False)
class LibraryUpdate(Update):
    """A change of W that depends on W, so that no ΔW can be told without it.

    Attributes:
        tensors: what the file holds, in fp32, by the library's own names.
    """

    tensors: Mapping[str, Tensor]

    library: ClassVar[str]
    """Whose module computes it, for errors."""

    @abstractmethod
    def computed(self, weight: Tensor) -> Tensor:
        """W' − W by the library's module, for a weight in fp32 that has two dimensions or a kernel besides."""

    def of_rows(self, first: int, last: int) -> LibraryUpdate:
        """The update of some outputs of the layer, for a model that has them as a layer by themselves.

        Args:
            first: the first row of W.
            last: the one after the last.

        Raises:
            AdapterFileError: what becomes of these rows depends on others.
        """
        raise AdapterFileError(
            f"{self.where} is {self.kind} on a layer that is several in this model, and what it does to one of them "
            "depends on the others: merge it with the program that made it."
        )

    @property
    def has_delta(self) -> bool:
        """False: ΔW depends on the weight."""
        return False

    @property
    def shapes(self) -> str:
        """Of the tensors, such as "oft_blocks 80 × 4 × 4"."""
        return ", ".join(f"{part} {by(tensor.shape)}" for part, tensor in self.tensors.items())

    def delta(self) -> Tensor:
        """There is none: it raises `AdapterFileError`."""
        raise AdapterFileError(
            f"{self.where} multiplies the base's weight ({self.kind}), so its update depends on it: merge it into the "
            "weights with merge_file or `diffusekrona merge`."
        )

    def change(self, weight: Tensor) -> Tensor:
        """W' − W in fp32 and in W's shape.

        Raises:
            AdapterFileError: the update was made for a weight of another shape; the library is not installed, or
                does not take what the file holds.
        """
        if not 2 <= weight.dim() <= 5:
            raise self.misfit("of a linear layer or a convolution", weight)
        try:
            # A module's first weights are drawn at random, which is to leave the caller's own draws alone.
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return self.computed(weight.detach().float().contiguous()).float().reshape(weight.shape)
        except (AdapterFileError, torch.OutOfMemoryError):
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise AdapterFileError(f"{self.where} is nothing that {self.library} can compute: {text}") from error

    def misfit(self, made_for: str, weight: Tensor) -> AdapterFileError:
        """An error about a weight of another shape."""
        return AdapterFileError(
            f"{self.where} was made for a weight {made_for}, but the one here is {by(weight.shape)}; the file is for "
            "another model."
        )


def layer_around(weight: Tensor) -> nn.Module:
    """A linear layer or convolution that has this weight, and no bias."""
    (d, h), kernel = weight.shape[:2], tuple(weight.shape[2:])
    layer: nn.Module
    if kernel:
        layer = _CONVOLUTIONS[len(kernel)](h, d, kernel, bias=False, device="meta")  # type: ignore[arg-type]
    else:
        layer = nn.Linear(h, d, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def common(layer: LayerTensors, *switches: str) -> Common:
    """The fields that every kind of update has, where the switches are parts that only turn something on.

    Raises:
        AdapterFileError: as `LayerTensors.common`; or there are DoRA's magnitudes, which these methods do not have.
    """
    fields = replace(
        layer, parts={part: tensor for part, tensor in layer.parts.items() if part not in switches}
    ).common()
    if fields["dora_scale"] is not None:
        raise layer.error(
            "holds DoRA's magnitudes beside a method that multiplies the weight, which do not go together"
        )
    return fields
