"""PEFT's image benchmark in a checkout of its repository, and our experiments put into it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusekrona.errors import KronAError
from diffusekrona.storage import write_whole

METHOD = "krona"
"""The folder of our experiments, and the first part of their names."""

OURS = Path(__file__).parent / "experiments" / METHOD
CONFIG, PARAMS = "adapter_config.json", "training_params.json"
EXPERIMENTS = tuple(sorted(path.parent.name for path in OURS.glob(f"*/{CONFIG}")))

BASE = "black-forest-labs/FLUX.2-klein-base-4B"
"""The base model whose layers our factors divide."""

DEFAULTS = "default_training_params.json"
RESULTS = ("results", "temporary_results", "cancelled_results")
"""Where runs are written that count, that were made on a branch, and that did not finish."""

CLONE = "git clone https://github.com/huggingface/peft"
_KEYS = ("model_id", "dataset_id", "dino_model_id", "max_steps", "optimizer_kwargs")
_PARTS = ("run.py", DEFAULTS, "requirements.txt", "experiments", *RESULTS)


@dataclass(frozen=True)
class Benchmark:
    """The benchmark.

    Attributes:
        folder: `method_comparison/image-gen` of the checkout.
        source: the folder from which Python imports the checkout's PEFT. The benchmark asks git for its branch, and
            counts only runs on `main`.
        branch: that branch.
    """

    folder: Path
    source: Path
    branch: str

    def params(self, experiment: str) -> dict[str, Any]:
        """What an experiment trains with: the benchmark's defaults, with its own values over them."""
        own = self.folder / "experiments" / experiment / PARAMS
        return read_json(self.folder / DEFAULTS) | (read_json(own) if own.is_file() else {})


def find_benchmark(checkout: Path) -> Benchmark:
    """The benchmark of a checkout.

    Raises:
        KronAError: the folder is no checkout of PEFT's repository, or its benchmark is not as we know it.
    """
    root = checkout.resolve()
    if not (root / "src" / "peft" / "__init__.py").is_file():
        raise KronAError(f"{checkout} is not a checkout of PEFT's repository: it has no src/peft. Make one: {CLONE}")
    folder = root / "method_comparison" / "image-gen"
    if not folder.is_dir():
        raise KronAError(f"{checkout} has no method_comparison/image-gen, which is PEFT's image benchmark. Update it.")
    if missing := [name for name in _PARTS if not (folder / name).exists()]:
        raise _changed(f"{folder} has no {', '.join(missing)}")
    defaults = read_json(folder / DEFAULTS)
    if unknown := [key for key in _KEYS if key not in defaults]:
        raise _changed(f"{DEFAULTS} has no {', '.join(unknown)}")
    if defaults["model_id"] != BASE:
        raise _changed(f"its base model is {defaults['model_id']}; our experiments are for the layers of {BASE}")
    return Benchmark(folder, root / "src", _branch(root))


def put_experiments(benchmark: Benchmark, names: Sequence[str], overwrite: bool = False) -> list[Path]:
    """Copy our experiments of these names into the benchmark, all or none; the files that are new or changed.

    Raises:
        KronAError: the benchmark has one of the files with another content, and `overwrite` is False.
    """
    wanted = {
        benchmark.folder / "experiments" / METHOD / name / part: (OURS / name / part).read_bytes()
        for name in names
        for part in (CONFIG, PARAMS)
    }
    new = {path: content for path, content in wanted.items() if not path.exists() or path.read_bytes() != content}
    if (differing := [str(path) for path in new if path.exists()]) and not overwrite:
        raise KronAError(
            f"{', '.join(differing)} differ from ours. Nothing was copied. Move them away, or give --overwrite."
        )
    write_whole(new)
    return list(new)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        KronAError: it does not.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KronAError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise KronAError(f"{path} should hold an object, and holds {type(found).__name__}.")
    return found


def _branch(root: Path) -> str:
    """The branch that the benchmark will write into its results.

    Raises:
        KronAError: git cannot say, or says it of a repository around the folder.
    """
    found = subprocess.run(
        ["git", "rev-parse", "--show-toplevel", "--abbrev-ref", "HEAD"], cwd=root, capture_output=True, text=True
    )
    top, _, branch = found.stdout.strip().partition("\n")
    if found.returncode or Path(top).resolve() != root:
        raise KronAError(
            f"{root} is not the top of a git repository, and the benchmark writes PEFT's branch and commit into its "
            f"results. Make a checkout: {CLONE}"
        )
    return branch


def _changed(what: str) -> KronAError:
    return KronAError(
        f"PEFT's image benchmark is not as it was in August 2026: {what}. Use a checkout of that time, or fit "
        "research/peft_image_gen to it."
    )
