"""Whether a saved adapter fits a model, decided before anything is changed."""

from __future__ import annotations

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import AdapterFileError, FactorShapeError
from ..tuner.model import KronAModel
from ..tuner.targets import layer_shapes, target_layers
from .formats.krona import SavedAdapter


def check_fit(component: nn.Module, saved: SavedAdapter) -> None:
    """Raise `AdapterFileError` unless an adapter has just the tensors that its config means in a component.

    The text says what is missing, unknown, misshapen or not finite, and where the file was read.
    """
    factors = _expected_factors(component, saved)
    expected = {**factors, **_expected_copies(component, saved)}
    present = {key: tuple(tensor.shape) for key, tensor in saved.tensors.items()}
    misshapen = [
        f"{key} is {_times(present[key])}, not {_times(shape)}"
        for key, shape in expected.items()
        if present.get(key, shape) != shape
    ]
    problems = [
        "" if factors else "its config means no layer of this model",
        _list("not in this model", [key for key in present if key not in expected]),
        _list("missing from the file", [key for key in expected if key not in present]),
        _list("misshapen", misshapen),
        _list("not of floating-point numbers", [key for key in factors if _is_whole(saved.tensors.get(key))]),
        _list("without finite values", [key for key, t in saved.tensors.items() if not _is_finite(t)]),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise AdapterFileError(
            f"{saved.source} does not fit this {type(component).__name__}, which is unchanged:\n  "
            + "\n  ".join(found)
            + ("\n  It looks made for another architecture." if not set(present) & set(expected) else "")
        )


def _expected_factors(component: nn.Module, saved: SavedAdapter) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in target_layers(component, saved.config).items():
        try:
            shapes = layer_shapes(saved.config, name, layer)
        except FactorShapeError as error:
            raise AdapterFileError(
                f"{saved.source} does not fit this {type(component).__name__}, which is unchanged: "
                f"{name}: {error}. It looks made for another architecture."
            ) from error
        expected.update({f"{name}.{KronAModel.prefix}{factor}": size for factor, size in shapes.tensors.items()})
    return expected


def _expected_copies(component: nn.Module, saved: SavedAdapter) -> dict[str, tuple[int, ...]]:
    endings = tuple(saved.config.modules_to_save or ())
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in component.named_modules():
        # PEFT takes every module whose name ends so, at a dot or not.
        if name.endswith(endings):
            original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            expected.update({f"{name}.{key}": tuple(t.shape) for key, t in original.state_dict().items()})
    return expected


def _is_whole(tensor: Tensor | None) -> bool:
    return tensor is not None and not tensor.is_floating_point()


def _is_finite(tensor: Tensor) -> bool:
    # In fp32, which the factors are kept in: a large fp64 number is an infinity there.
    return bool(torch.isfinite(tensor.float()).all())


def _list(what: str, items: list[str], shown: int = 3) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} tensor(s) {what}: {', '.join(items[:shown])}{more}" if items else ""


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "a single number"
