"""Which modules of a model a layer of a file is, and which of their rows: in original checkpoints, and where fused.

A layout says how the original checkpoints of a family, and with them other programs, name and fuse a model's layers. A
family's file says it in a table, from the name in the original checkpoint to the name in Diffusers. "{}" stands for a
block's number, the same on both sides. Where the original has one layer and Diffusers several, their rows follow each
other in the order of the table, each with as many as the module has outputs. A layer that is not in the table has the
same name on both sides.

Diffusers, too, can make one layer of an attention's projections (`fuse_qkv_projections`). Files that were written with
a fused model have its names (`to_qkv`), others those of the single projections; either may meet a model of the other
kind. A fused model's single projections are still there, but unused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor, nn

from ...tuner.projections import FUSED_PROJECTIONS, is_fused

Place = tuple[str, str]
"""A layer of a model: its component of the pipeline, "" for a model by itself, and its name there."""

Rows = tuple[int, int]
"""First row, and the one after the last."""


class Part(NamedTuple):
    """A part of a layer of a file: the rows of it that are rows of one module of a model.

    Attributes:
        module: the module's name.
        rows: of the file's layer; None for all.
        into: of the module's weight; None for all.
    """

    module: str
    rows: Rows | None = None
    into: Rows | None = None


@dataclass(frozen=True)
class Fused:
    """Several modules of Diffusers that are one layer in the original, their rows one after the other."""

    modules: tuple[str, ...]


@dataclass(frozen=True)
class HalvesSwapped:
    """A module whose two halves of rows are the other way round in the original.

    Such are modulations that give shift and scale, where Diffusers gives scale and shift.

    Attributes:
        module: the module's name.
        unless: a module that is there only in the blocks where the halves are not swapped.
    """

    module: str
    unless: str | None = None


def fused(before: str, *names: str) -> Fused:
    """Several modules of one parent: `fused("attn.", "to_q", "to_k")`."""
    return Fused(tuple(before + name for name in names))


Entry = str | Fused | HalvesSwapped
"""What an original layer is in Diffusers."""


@dataclass(frozen=True)
class Layout:
    """The layout of one family.

    Attributes:
        family: its name in tables and commands, such as "flux".
        title: its name in sentences, such as "FLUX.1".
        models: names of the classes of Diffusers or transformers that are in this layout.
        table: name in the original → name in Diffusers.
        also: further names that other programs have for the same layers, like `table`.
        signs: regular expressions, one of which is found in the names of a file that is made for this family and for
            no other; `inspect` goes by them.
    """

    family: str
    title: str
    models: tuple[str, ...]
    table: Mapping[str, Entry] = field(default_factory=dict)
    also: Mapping[str, Entry] = field(default_factory=dict)
    signs: tuple[str, ...] = ()

    def parts(self, model: nn.Module, also: bool = True) -> Iterator[tuple[str, tuple[Part, ...]]]:
        """Each original layer of which the model has all modules: its name and its parts.

        Args:
            model: of this family.
            also: with the further names that other programs have.
        """
        modules = dict(model.named_modules())
        for table in (self.table, self.also) if also else (self.table,):
            for original, entry in table.items():
                for name, filled in _filled(original, entry, modules):
                    parts = _parts(filled, modules)
                    if parts is not None:
                        yield name, parts


def _filled(original: str, entry: Entry, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Entry]]:
    """The entry for each block that the model has."""
    first = (
        entry.modules[0] if isinstance(entry, Fused) else entry.module if isinstance(entry, HalvesSwapped) else entry
    )
    if "{}" not in first:
        yield original, entry
        return
    pattern = re.compile(re.escape(first).replace(r"\{\}", r"(\d+)"))
    for name in modules:
        match = pattern.fullmatch(name)
        if match:
            numbers = match.groups()
            yield original.format(*numbers), _each(entry, partial(_numbered, numbers=numbers))


def _numbered(name: str, numbers: tuple[str, ...]) -> str:
    return name.format(*numbers)


def _each(entry: Entry, change: Callable[[str], str]) -> Entry:
    if isinstance(entry, Fused):
        return Fused(tuple(map(change, entry.modules)))
    if isinstance(entry, HalvesSwapped):
        return HalvesSwapped(change(entry.module), entry.unless and change(entry.unless))
    return change(entry)


def _parts(entry: Entry, modules: Mapping[str, nn.Module]) -> tuple[Part, ...] | None:
    if isinstance(entry, str):
        return (Part(entry),) if entry in modules else None
    names = entry.modules if isinstance(entry, Fused) else (entry.module,)
    if any(name not in modules for name in names):
        return None
    sizes = [outputs(modules[name]) for name in names]
    if isinstance(entry, HalvesSwapped) and entry.unless in modules:
        return (Part(entry.module),)
    if isinstance(entry, HalvesSwapped):
        half, whole = sizes[0] // 2, sizes[0]
        return Part(names[0], (0, half), (half, whole)), Part(names[0], (half, whole), (0, half))
    return tuple(Part(name, rows) for name, rows in zip(names, consecutive_rows(sizes), strict=True))


def fused_names(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """The names that an attention's projections would have if they were fused, where a model has them apart."""
    for name, module in modules.items():
        for whole, single in FUSED_PROJECTIONS.items():
            if f"{name}.{whole}" in modules or not all(f"{name}.{one}" in modules for one in single):
                continue
            if whole == "to_kv" and not getattr(module, "is_cross_attention", True):
                continue
            names = [f"{name}.{one}" for one in single]
            rows = consecutive_rows(outputs(modules[one]) for one in names)
            yield f"{name}.{whole}", tuple(map(Part, names, rows))


def redirections(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, int]]:
    """In a model whose projections are fused: single projection → the fused one, and its first row in that."""
    found: dict[str, tuple[str, int]] = {}
    for name, module in modules.items():
        if not is_fused(module):
            continue
        for whole, single in FUSED_PROJECTIONS.items():
            if f"{name}.{whole}" not in modules:
                continue
            names = [f"{name}.{one}" for one in single]
            rows = consecutive_rows(outputs(modules[one]) for one in names)
            found |= {one: (f"{name}.{whole}", first) for one, (first, _) in zip(names, rows, strict=True)}
    return found


def redirected(
    parts: tuple[Part, ...], fused: Mapping[str, tuple[str, int]], modules: Mapping[str, nn.Module]
) -> tuple[Part, ...]:
    """The same parts in a model whose projections are fused; rows that follow each other are one part again."""
    if not any(part.module in fused for part in parts):
        return parts
    moved: list[Part] = []
    for part in parts:
        if part.module not in fused:
            moved.append(part)
            continue
        whole, first = fused[part.module]
        size = outputs(modules[part.module])
        rows = part.rows or (0, size)
        into = part.into or (0, size)
        moved.append(Part(whole, rows, (first + into[0], first + into[1])))
    return tuple(_joined(moved, modules))


def _joined(parts: list[Part], modules: Mapping[str, nn.Module]) -> Iterator[Part]:
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if (
            last
            and (last.module, last.rows and last.rows[1], last.into and last.into[1])
            == (part.module, part.rows and part.rows[0], part.into and part.into[0])
            and part.rows
            and part.into
            and last.rows
            and last.into
        ):
            joined[-1] = Part(part.module, (last.rows[0], part.rows[1]), (last.into[0], part.into[1]))
        else:
            joined.append(part)
    of_file = max((part.rows[1] for part in joined if part.rows), default=0)
    for part in joined:
        whole = outputs(modules[part.module])
        into = None if part.into == (0, whole) else part.into
        alone = len(joined) == 1 and part.rows == (0, of_file)
        yield Part(part.module, None if alone else part.rows, into)


def consecutive_rows(sizes: Iterable[int]) -> list[Rows]:
    """The rows of layers of these sizes in one that has them one after the other."""
    return list(pairwise(accumulate(sizes, initial=0)))


def outputs(module: nn.Module) -> int:
    """Rows of a layer's weight, with or without adapters around it."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = module.get_base_layer().weight  # type: ignore[operator]
    return int(getattr(module, "out_features", len(weight)))
