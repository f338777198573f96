"""Whether a saved adapter fits a model, decided before anything is changed."""

from __future__ import annotations

import re

import torch
from torch import nn

from .errors import AdapterFileError, FactorShapeError
from .formats.krona import SavedAdapter
from .model import KronAModel, layer_shapes, target_layers

_FACTORS = (f"{KronAModel.prefix}A", f"{KronAModel.prefix}B")


def check_fit(component: nn.Module, saved: SavedAdapter) -> None:
    """Raise `AdapterFileError` unless a saved adapter has just the tensors that its config means in this component.

    The text says what is missing, unknown, misshapen or not finite, and where the file was read.
    """
    expected = _expected_shapes(component, saved)
    present = {key: tuple(tensor.shape) for key, tensor in saved.tensors.items() if not _is_extra(saved, key)}
    problems = [
        _list("not in this model", [key for key in present if key not in expected]),
        _list("missing from the file", [key for key in expected if key not in present]),
        _list(
            "misshapen",
            [
                f"{key} is {_times(present[key])}, not {_times(shape)}"
                for key, shape in expected.items()
                if present.get(key, shape) != shape
            ],
        ),
        _list("not finite", [key for key, t in saved.tensors.items() if not bool(torch.isfinite(t).all())]),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise AdapterFileError(
            f"{saved.source} does not fit this {type(component).__name__}, which is unchanged:\n  "
            + "\n  ".join(found)
            + ("\n  It looks made for another architecture." if not set(present) & set(expected) else "")
        )


def _expected_shapes(component: nn.Module, saved: SavedAdapter) -> dict[str, tuple[int, int]]:
    expected = {}
    for name, layer in target_layers(component, saved.config).items():
        try:
            shapes = layer_shapes(saved.config, name, layer)
        except FactorShapeError as error:
            raise AdapterFileError(
                f"{saved.source} does not fit this {type(component).__name__}, which is unchanged: {name}: {error}. "
                "It looks made for another architecture."
            ) from error
        expected[f"{name}.{_FACTORS[0]}"] = (shapes.a1, shapes.a2)
        expected[f"{name}.{_FACTORS[1]}"] = (shapes.b1, shapes.b2)
    return expected


def _is_extra(saved: SavedAdapter, key: str) -> bool:
    return any(re.match(rf"(^|.*\.){name}\..*", key) for name in saved.config.modules_to_save or [])


def _list(what: str, items: list[str], shown: int = 3) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} tensor(s) {what}: {', '.join(items[:shown])}{more}" if items else ""


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
