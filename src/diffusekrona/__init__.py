"""Kronecker adapters (ΔW = s · A ⊗ B) for Diffusers models, as a PEFT tuner.

The method is DiffuseKronA's (arXiv 2402.17412); the files to read first are `kron/shapes.py`, `kron/products.py`,
`tuner/layer.py` and `tuner/model.py`, in that order.
"""

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

__all__ = [
    "AdapterStore",
    "KronAConfig",
    "KronALayer",
    "KronAModel",
    "KronAReport",
    "__version__",
    "hotswap_krona",
    "inject_krona",
    "kron_linear",
    "krona_batch",
    "krona_report",
    "load_krona",
    "merge_file",
    "merge_krona",
    "save_krona",
    "unload_krona",
    "unmerge_krona",
]

__version__: str


def _started_as_the_command() -> bool:
    if Path(*sys.argv[:1]).stem == "diffusekrona":
        return True
    return ("-m", "diffusekrona.cli") in pairwise(sys.orig_argv)


# Importing this package enters KronA in PEFT's tables, which takes seconds. The command loads PEFT only when it needs
# it, so that it answers `--help` and a wrong flag at once. Where this guess is wrong, names are loaded at their first
# use, or KronA's command is slow; nothing else changes.
if TYPE_CHECKING or not _started_as_the_command():
    from .files.merge import merge_file
    from .kron.products import kron_linear
    from .pipeline import hotswap_krona, inject_krona, load_krona, merge_krona, save_krona, unload_krona, unmerge_krona
    from .report import KronAReport, krona_report
    from .serving.batch import krona_batch
    from .serving.store import AdapterStore
    from .tuner.config import KronAConfig
    from .tuner.layer import KronALayer
    from .tuner.model import KronAModel


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("diffusekrona")
    from .lazy import loaded_at_first_use

    homes = (
        ".tuner.config",
        ".tuner.layer",
        ".tuner.model",
        ".kron.products",
        ".pipeline",
        ".report",
        ".serving.batch",
        ".serving.store",
    )
    return loaded_at_first_use(__name__, __all__, *homes, ".files.merge")(name)
