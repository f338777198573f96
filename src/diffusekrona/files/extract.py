"""A full fine-tune as a KronA adapter: the nearest Kronecker products to what it changed in a base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..bases.loading import BaseModelError
from ..kron.exact import arithmetic_dtype
from ..storage import read_names
from ..tuner.config import KronAConfig
from ..tuner.fields import ATTENTION
from ..tuner.targets import target_layers
from .convert import Conversion, Progress, Target, write_nearest
from .formats import Format
from .formats.updates import Update
from .layouts.layout import Place
from .layouts.names import foreign_names
from .merge_base import folder_components
from .write import check_output


def extract(
    base: Path,
    tuned: Path,
    output: Path,
    target: Target,
    to: Format = "krona",
    target_modules: str = ATTENTION,
    on_layer: Progress | None = None,
) -> Conversion:
    """Write the nearest Kronecker products to what a full fine-tune changed.

    Args:
        base: a pipeline's folder in Diffusers' layout.
        tuned: the same after the fine-tune.
        output: as in `convert`.
        target: the factors; a budget of at most 1 is a share of the layers' weights.
        to: as in `convert`.
        target_modules: which layers, as `KronAConfig` takes it. What changed elsewhere is left out.
        on_layer: called after each layer.

    Raises:
        BaseModelError: one of the folders is no pipeline's, or they are of different models.
        FactorShapeError: some layer cannot take the factors, or none are within the budget.
        OSError: the output cannot be written.
    """
    check_output(output, to)
    components = folder_components(base)
    updates: dict[Place, Update] = {}
    for part, module in components.items():
        before, after = (FolderWeights(folder / part, part, module) for folder in (base, tuned))
        targets = target_layers(module, KronAConfig(target_modules=target_modules))
        for name in targets:
            if before.differs(after, name):
                size = math.prod(module.get_submodule(name).weight.shape)  # type: ignore[arg-type]
                updates[part, name] = Difference(before, after, name, kind="full", parameters=size)
    if not updates:
        raise BaseModelError(f"{tuned} and {base} have the same weights in the layers that target_modules names.")
    return write_nearest(updates, components, tuned, output, to, target, on_layer)


class FolderWeights:
    """The layers' weights of one component in a pipeline's folder, read when they are asked for.

    Raises:
        BaseModelError: the folder has no safetensors files.
    """

    def __init__(self, folder: Path, part: str, model: nn.Module) -> None:
        self.folder = folder
        aliases = {f"{alias}.weight": name for alias, name in foreign_names(part, model).items()}
        self._places: dict[str, tuple[Path, str]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for key in read_names(path)[0]:
                if key in aliases:
                    self._places[aliases[key]] = (path, key)
        if not self._places:
            raise BaseModelError(f"{folder} holds no safetensors weights; save the pipeline with save_pretrained.")

    def read(self, name: str) -> Tensor:
        """A layer's weight, in fp32 or wider.

        Raises:
            BaseModelError: there is none.
        """
        if name not in self._places:
            raise BaseModelError(f"{self.folder} has no weight for {name}.")
        path, key = self._places[name]
        with safe_open(path, framework="pt") as file:
            weight: Tensor = file.get_tensor(key)
        return weight.to(arithmetic_dtype(weight.dtype))

    def differs(self, other: FolderWeights, name: str) -> bool:
        """Whether another folder's weight of this layer is another one.

        Raises:
            BaseModelError: it is missing or has another shape.
        """
        mine, theirs = self.read(name), other.read(name)
        if mine.shape != theirs.shape:
            raise BaseModelError(
                f"{name} is {tuple(mine.shape)} in {self.folder} and {tuple(theirs.shape)} in {other.folder}: they are "
                "of different models."
            )
        return not torch.equal(mine, theirs)


@dataclass(frozen=True, eq=False)
class Difference(Update):
    """What a fine-tune changed in one layer, read from both folders when it is asked for.

    Attributes:
        before: the base's weights.
        after: the fine-tune's.
        name: the layer.
    """

    before: FolderWeights
    after: FolderWeights
    name: str

    def delta(self) -> Tensor:
        """W' − W, in fp32 or wider."""
        return self.after.read(self.name) - self.before.read(self.name)
