"""The rows of the paper's Tables 2, 4, 6, 7 and 8 that count parameters, and other ways to count that explain them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import nn

from diffusekrona.bases.architectures import build_pipeline
from diffusekrona.errors import KronAError
from diffusekrona.tuner.config import KronAConfig
from diffusekrona.tuner.targets import target_layers

from ..methods import CustomDiffusion, FullDreamBooth, KronA, LoHa, LoKr, LoRA, Method, SVDiff

TABLES = (2, 4, 6, 7, 8)
GRID = (1, 2, 4, 8, 16, 32, 64, 128)
"""The values of a1 in Table 6; those of a2 are the same without 1."""

Components = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Recount:
    """Another way to count, which gives the number that the paper prints.

    Attributes:
        what: it counts.
        count: from the components of a pipeline.
    """

    what: str
    count: Callable[[Components], int]


@dataclass(frozen=True)
class Row:
    """One row of one of the paper's tables.

    Attributes:
        table: the paper's number of it.
        label: what the row is called there.
        model: a name in `architectures.PIPELINES`.
        method: what the row is of.
        printed: the count that the paper prints.
        recount: how that comes about, where it is another than ours and that is known.
        note: what else is to be said of it.
    """

    table: int
    label: str
    model: str
    method: Method
    printed: str
    recount: Recount | None = None
    note: str = ""


@cache
def components_of(model: str) -> Components:
    """The components of a pipeline on the meta device, built once."""
    return build_pipeline(model)


def count_of(method: Method, components: Components) -> int:
    """What a method trains in the components of a pipeline."""
    return method.count(SimpleNamespace(components=dict(components)))


def rows_of(table: int | None = None) -> list[Row]:
    """The rows of one of the paper's tables, or of all.

    Raises:
        KronAError: the paper has no such table of parameter counts.
    """
    if table is not None and table not in TABLES:
        raise KronAError(f"Table {table} counts no parameters; there are {', '.join(map(str, TABLES))}.")
    return [row for row in (*_TABLE_2, *_TABLE_4, *_TABLE_6, *_TABLE_7, *_TABLE_8) if table in (None, row.table)]


def _as(what: str, method: Method) -> Recount:
    return Recount(what, lambda components: count_of(method, components))


def _token_table(components: Components) -> int:
    """Custom Diffusion as Diffusers' script counts: with every row of the text encoder's token embeddings."""
    encoder: Any = components["text_encoder"]
    return count_of(CustomDiffusion(), components) + int(encoder.get_input_embeddings().weight.numel())


def _quarter(a2: int) -> Recount:
    """The rows of Table 6 with a1 = 1: an A of 1 × a2, but a B as if a1 were 4."""

    def count(components: Components) -> int:
        layers = len(target_layers(components["unet"], KronAConfig()))
        return count_of(KronA(4, a2), components) - layers * 3 * a2

    return Recount("a1 = 1 makes B d × h/a2; printed is the count for a quarter of it, d/4 × h/a2", count)


_FEED_FORWARD = "attention+ff"
_WITH_TEXT = "With the text encoder, which the method section leaves frozen for SDXL."

_TABLE_2 = (
    Row(2, "LoRA-DreamBooth", "sdxl", LoRA(4), "5.8 M"),
    Row(2, "DiffuseKronA", "sdxl", KronA(4, 64), "3.8 M"),
    Row(2, "LoRA-DreamBooth", "sd15", LoRA(4, text_encoders=True), "1.09 M", note=_WITH_TEXT),
    Row(2, "DiffuseKronA", "sd15", KronA(4, 64, text_encoders=True), "0.52 M", note=_WITH_TEXT),
)

_TABLE_4 = (
    Row(
        4,
        "Custom Diffusion",
        "sd15",
        CustomDiffusion(),
        "57.1 M",
        Recount("with the whole table of token embeddings, of which one new row is meant to be learnt", _token_table),
        "Diffusers' script for it hands the optimizer the table; the weights of K and V alone are a third.",
    ),
    Row(4, "DreamBooth", "sd15", FullDreamBooth(text_encoders=True), "982.5 M", note=_WITH_TEXT),
    Row(4, "LoRA-DreamBooth", "sd15", LoRA(4, text_encoders=True), "1.09 M", note=_WITH_TEXT),
    Row(
        4,
        "SVDiff",
        "sd15",
        SVDiff(text_encoders=True),
        "0.44 M",
        note="SVDiff's paper gives the size of its file, 1.7 MB, and not which weights are in it; 1.7 · 2²⁰ bytes are "
        "445,645 float32 numbers, which cut off is what is printed. Ours is every singular value of UNet and text "
        "encoder, as the public implementation trains them.",
    ),
    Row(4, "DiffuseKronA", "sd15", KronA(8, 64, text_encoders=True), "0.32 M", note=_WITH_TEXT),
)

_PRINTED_GRID = {
    1: (119399520, 59701440, 29854080, 14933760, 7480320, 3767040, 1937280),
    2: (238799040, 119402880, 59708160, 29867520, 14960640, 7534080, 3874560),
    4: (119402880, 59708160, 29867520, 14960640, 7534080, 3874560, 2152320),
    8: (59708160, 29867520, 14960640, 7534080, 3874560, 2152320, 1506240),
    16: (29867520, 14960640, 7534080, 3874560, 2152320, 1506240, 1613280),
    32: (14960640, 7534080, 3874560, 2152320, 1506240, 1613280, 2526960),
    64: (7534080, 3874560, 2152320, 1506240, 1613280, 2526960, 4704120),
    128: (3874560, 2152320, 1506240, 1613280, 2526960, 4704120, 9233340),
}
"""Table 6: a1 → counts at a2 = 2, 4, …, 128."""

_TABLE_6 = tuple(
    Row(6, f"a1 = {a1}, a2 = {a2}", "sdxl", KronA(a1, a2), str(printed), _quarter(a2) if a1 == 1 else None)
    for a1, line in _PRINTED_GRID.items()
    for a2, printed in zip(GRID[1:], line, strict=True)
)

_TABLE_7 = (
    Row(7, "DiffuseKronA, a1 = 2", "sdxl", KronA(2, 64), "3.8 M", _as("swapped with the next row", KronA(4, 64))),
    Row(7, "DiffuseKronA, a1 = 4", "sdxl", KronA(4, 64), "7.5 M", _as("swapped with the row above", KronA(2, 64))),
    Row(7, "DiffuseKronA, a1 = 8", "sdxl", KronA(8, 64), "2.1 M"),
    Row(7, "DiffuseKronA, a1 = 16", "sdxl", KronA(16, 64), "1.5 M"),
    Row(7, "LoRA-DreamBooth, rank = 4", "sdxl", LoRA(4), "5.8 M"),
    Row(
        7, "LoKr, f = −1, rank = 8", "sdxl", LoKr(8, factor=-1), "1.36 M",
        _as("with the feed-forward layers, too", LoKr(8, factor=-1, targets=_FEED_FORWARD)),
        "On the layers that KronA and LoRA adapt it is smaller yet.",
    ),
    Row(7, "LoKr, f = 8", "sdxl", LoKr(factor=8), "14.9 M"),
    Row(
        7, "LoHA, rank = 4", "sdxl", LoHa(4), "20.9 M",
        _as("with the feed-forward layers, too", LoHa(4, targets=_FEED_FORWARD)),
        "On the layers that KronA and LoRA adapt it is twice LoRA's.",
    ),
)  # fmt: skip

_TABLE_8 = (
    Row(8, "LoKr, f = 2", "sdxl", LoKr(factor=2), "238.7 M"),
    Row(8, "LoKr, f = 4", "sdxl", LoKr(factor=4), "59.7 M"),
    Row(8, "LoKr, f = 8", "sdxl", LoKr(factor=8), "14.9 M"),
    Row(8, "LoKr, f = 16", "sdxl", LoKr(factor=16), "3.8 M"),
    Row(8, "DiffuseKronA, a1 = 8", "sdxl", KronA(8, 64), "2.1 M"),
)
