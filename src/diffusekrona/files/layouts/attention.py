"""Projections of an attention that Diffusers can fuse: `fuse_qkv_projections` makes one layer of several.

Files that were written with a fused model have its names (`to_qkv`), others those of the single projections; either
may meet a model of the other kind. A fused model's single projections are still there, but unused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from .layout import Part, consecutive_rows, outputs

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""Name of a fused projection → those that it is made of, in the order of their rows."""


def fused_names(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """The names that an attention's projections would have if they were fused, where a model has them apart."""
    for name, module in modules.items():
        for whole, single in FUSED.items():
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
        if not getattr(module, "fused_projections", False):
            continue
        for whole, single in FUSED.items():
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
