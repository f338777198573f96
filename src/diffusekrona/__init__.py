"""Kronecker adapters (ΔW = s · A ⊗ B) for Diffusers models, as a PEFT tuner.

The method is DiffuseKronA's (arXiv 2402.17412); the files to read first are `kron/shapes.py`,
`kron/products.py`, `tuner/layer.py` and `tuner/model.py`, in that order.
"""

from .files.merge import merge_file
from .kron.products import kron_linear
from .pipeline import hotswap_krona, inject_krona, load_krona, merge_krona, save_krona, unload_krona, unmerge_krona
from .report import KronAReport, krona_report
from .tuner.config import KronAConfig
from .tuner.layer import KronALayer
from .tuner.model import KronAModel

__all__ = [
    "KronAConfig",
    "KronALayer",
    "KronAModel",
    "KronAReport",
    "hotswap_krona",
    "inject_krona",
    "kron_linear",
    "krona_report",
    "load_krona",
    "merge_file",
    "merge_krona",
    "save_krona",
    "unload_krona",
    "unmerge_krona",
]
