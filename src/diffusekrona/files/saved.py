"""What adapter files, our own and other programs', say about each layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError
from ..kron.products import dense_update
from ..kron.shapes import Layout
from ..tuner.components import is_denoiser
from ..tuner.targets import layer_alpha, target_layers
from .fit import check_fit
from .formats import foreign
from .formats import krona as krona_format
from .formats.krona import SavedAdapter
from .formats.updates import Update
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
