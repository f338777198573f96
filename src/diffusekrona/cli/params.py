"""`diffusekrona params`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..bases.architectures import ARCHITECTURES
from ..training.settings import AdapterSettings
from .console import console
from .options import flags_of, with_flags

EveryLayer = Annotated[bool, typer.Option(help="Print one row per layer instead of one per kind of layer.")]


@with_flags(flags_of(AdapterSettings, ("a1", "a2", "b1", "factors", "num_terms", "b_rank", "target_modules")))
def params(
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(ARCHITECTURES)}, or a pipeline's folder or hub id.")
    ] = "sdxl",
    every_layer: EveryLayer = False,
    **given: Any,
) -> None:
    """Count what an adapter would train, without weights: shapes, parameters, ranks, cost, LoRA beside it."""
    import torch

    from ..bases.architectures import build
    from ..bases.loading import load_base
    from ..pipeline import inject_krona
    from ..report import krona_report

    config = AdapterSettings(**given).config()
    target = build(model) if model in ARCHITECTURES else load_base(model, torch.float32)
    inject_krona(target, config)
    console.print(krona_report(target).table(every_layer))
