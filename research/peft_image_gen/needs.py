"""What the benchmark needs of this machine. All that is missing is told at once, before the first step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CacheNotFound, HfApi, scan_cache_dir
from packaging.requirements import Requirement

from diffusekrona.errors import KronAError

from .checkout import Benchmark

PYTHON = (3, 12)
"""The first Python whose temporary folders can be kept, by which the benchmark saves the adapter."""

_KINDS = {"model_id": "model", "dataset_id": "dataset", "dino_model_id": "model"}


def check_needs(benchmark: Benchmark, params: Iterable[dict[str, Any]]) -> None:
    """Check all that trainings by these parameters need.

    Raises:
        KronAError: something is missing.
    """
    _raise([*python_problems(), *package_problems(benchmark), *device_problems(), *hub_problems(params)])


def check_programs(benchmark: Benchmark) -> None:
    """Check what every run needs, whatever it trains and on what.

    Raises:
        KronAError: something is missing.
    """
    _raise([*python_problems(), *package_problems(benchmark)])


def _raise(problems: list[str]) -> None:
    if problems:
        raise KronAError("The benchmark cannot run here.\n- " + "\n- ".join(problems))


def python_problems(found: tuple[int, ...] = sys.version_info[:3]) -> Iterator[str]:
    """An older Python than the benchmark's."""
    if found < PYTHON:
        wanted, have = (".".join(map(str, one)) for one in (PYTHON, found))
        yield f"It needs Python {wanted} or newer, and this is {have}."


def package_problems(benchmark: Benchmark) -> Iterator[str]:
    """Packages of the benchmark's `requirements.txt` that are missing or too old."""
    wanted = (benchmark.folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for line in (line.partition("#")[0].strip() for line in wanted):
        if not line:
            continue
        requirement = Requirement(line)
        try:
            have = version(requirement.name)
        except PackageNotFoundError:
            yield f"The package {line} is not installed: pip install '{line}'"
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            yield f"The package {line} is asked for, and {have} is installed: pip install '{line}'"


def has_accelerator() -> bool:
    """Whether there is a device that the benchmark knows."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def device_problems() -> Iterator[str]:
    """No GPU."""
    if not has_accelerator():
        yield "It needs a GPU, of CUDA or XPU, and PyTorch finds none. On a CPU there is the dry run."


def hub_problems(params: Iterable[dict[str, Any]], ask: Callable[[str, str], object] | None = None) -> Iterator[str]:
    """Models and datasets that are no folder, not in the hub's cache, and that the hub does not give.

    Args:
        params: of each experiment.
        ask: asks the hub for a repository, by its name and kind; raises if it is not to be had.
    """
    ask = ask or (lambda name, kind: HfApi().repo_info(name, repo_type=kind, timeout=10))
    wanted = dict.fromkeys((str(one[key]), kind) for one in params for key, kind in _KINDS.items())
    for name, kind in wanted:
        if Path(name).is_dir() or (name, kind) in _cached():
            continue
        try:
            ask(name, kind)
        except Exception as error:  # of the hub's own, of the HTTP library that it uses, or of the system
            told = str(error).strip().partition("\n")[0]
            yield f"The {kind} {name} is neither in the hub's cache nor to be had from the hub: {told}"


def _cached() -> set[tuple[str, str]]:
    try:
        return {(repository.repo_id, repository.repo_type) for repository in scan_cache_dir().repos}
    except CacheNotFound:
        return set()
