"""`diffusekrona inspect`, `convert`, `extract` and `merge`: adapters as files."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bases.architectures import PIPELINES
from ..errors import KronAError
from ..files.formats import Format
from ..files.unused import AlphaOfWhole, OnUnused, Reading
from ..training.settings import AdapterSettings
from ..tuner.fields import ATTENTION
from .console import console, print_line
from .options import help_of
from .params import EveryLayer
from .progress import progress

if TYPE_CHECKING:
    from ..files.convert import Conversion, Target

Adapter = Annotated[Path, typer.Argument(help="Adapter of any program, a file or a folder.")]
Output = Annotated[Path, typer.Argument(help="File to write, which ends in .safetensors; for KronA also a folder.")]
ToFormat = Annotated[
    Format,
    typer.Option(
        help="Format to write: krona; LoKr for comfyui (also called lokr), kohya, diffusers, sdnext or invokeai; or "
        "lora, an exact LoRA."
    ),
]
Factors = Annotated[
    str | None, typer.Option(metavar="A1,A2", help="Approximate by the nearest Kronecker products of these factors.")
]
Budget = Annotated[
    float | None,
    typer.Option(help="Approximate with as many parameters as this; up to 1 it is a share of the source's."),
]
Terms = Annotated[
    int | None,
    typer.Option(
        show_default="1; within a budget, the best",
        help="Number of products that are summed for each layer.",
    ),
]
OnUnusedOption = Annotated[
    OnUnused,
    typer.Option(help="What to do about tensors that cannot be used: refuse the file (error), or use the rest (warn)."),
]
AlphaOfWholeOption = Annotated[
    AlphaOfWhole,
    typer.Option(
        help="Alpha of LoKr layers with two whole factors: ignored, as in most programs, or applied as alpha / rank."
    ),
]


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of a run, or the folder of a run or of its output, for the newest one.")
    ],
    output: Output,
) -> None:
    """Write the adapter of a run's checkpoint as a file that loads."""
    from ..training.export import export_checkpoint

    step = export_checkpoint(checkpoint, output)
    print_line(f"Saved {output}, the adapter after step {step}")


def inspect(file: Adapter, every_layer: EveryLayer = False) -> None:
    """Describe a file: method, program, model, shapes, ranks, norms, header, and possible conversions."""
    from ..files.inspect import METHODS, inspect_file

    found = inspect_file(file)
    if found.layers:
        norm = "" if math.isnan(found.norm) else f", norm {found.norm:.4g}"
        print_line(f"{file}: {METHODS[found.kind]}, {len(found.layers)} layers, {found.parameters:,} parameters{norm}")
        print_line(f"Layers have {found.naming}")
    else:
        print_line(f"{file}: no adapter, but {found.naming}")
    if found.made_by:
        print_line(f"Written by {found.made_by}")
    if found.made_for:
        print_line(f"Looks made for {found.made_for}")
    if found.layers:
        console.print(found.table(every_layer))
    for reason in found.unused:
        print_line(f"Not used: {reason}")
    for key, value in sorted(found.metadata.items()):
        print_line(f"{key}: {value}")
    for become in found.becomes:
        print_line(f"Can become {become}")


def convert(
    source: Adapter,
    output: Output,
    to: ToFormat = "krona",
    model: Annotated[
        str | None,
        typer.Option(
            show_default="found out", help=f"Base of the adapter: {', '.join(PIPELINES)}, or a pipeline's folder."
        ),
    ] = None,
    factors: Factors = None,
    budget: Budget = None,
    num_terms: Terms = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Multiply out factors that are products, for programs that refuse these.")
    ] = False,
    on_unused: OnUnusedOption = "error",
    alpha_of_whole: AlphaOfWholeOption = "ignored",
) -> None:
    """Write an adapter in another format: exactly, or with --factors or --budget by the nearest Kronecker products."""
    from ..files.convert import convert as convert_file

    target = _target(factors, budget, num_terms) if factors is not None or budget is not None else None
    if target is None and num_terms is not None:
        raise KronAError("--num-terms needs --factors or --budget.")
    with progress("Approximating", total=None) as show:
        result = convert_file(
            source,
            output,
            to,
            model,
            target,
            on_layer=lambda done, total: show(completed=done, total=total),
            reading=Reading(on_unused, alpha_of_whole),
            whole=whole,
            say=print_line,
        )
    _print_conversion(output, result)


def extract(
    base: Annotated[Path, typer.Argument(help="Folder of the base, in Diffusers' layout.")],
    tuned: Annotated[Path, typer.Argument(help="Folder of the same pipeline after a full fine-tune.")],
    output: Output,
    to: ToFormat = "krona",
    target_modules: Annotated[str, typer.Option(help=help_of(AdapterSettings, "target_modules"))] = ATTENTION,
    factors: Factors = None,
    budget: Budget = None,
    num_terms: Terms = None,
) -> None:
    """Write a full fine-tune as an adapter: the nearest Kronecker products to what it changed."""
    from ..files.extract import extract as extract_adapter

    with progress("Approximating", total=None) as show:
        result = extract_adapter(
            base,
            tuned,
            output,
            _target(factors, budget, num_terms),
            to,
            target_modules,
            on_layer=lambda done, total: show(completed=done, total=total),
        )
    _print_conversion(output, result)


def merge(
    base: Annotated[Path, typer.Argument(help="Folder of a pipeline, or a checkpoint file of SDXL or SD 1.x.")],
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(help="Folder or file to write, as the base is one.")],
    weight: Annotated[float, typer.Option(help="Strength of the adapter; 1 is as it was trained.")] = 1.0,
    on_unused: OnUnusedOption = "error",
    alpha_of_whole: AlphaOfWholeOption = "ignored",
) -> None:
    """Write a model with an adapter merged into its weights, for good."""
    from ..files.merge_base import merge_into_files

    layers = merge_into_files(base, adapter, output, weight, Reading(on_unused, alpha_of_whole))
    print_line(f"Wrote {output}: {layers} layers changed")


def _target(factors: str | None, budget: float | None, num_terms: int | None) -> Target:
    from ..files.convert import Target

    return Target(None if factors is None else _pair(factors), budget, num_terms)


def _pair(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if found is None:
        raise KronAError(f"--factors takes A1,A2, such as 4,64, not {text!r}.")
    return int(found[1]), int(found[2])


def _print_conversion(output: Path, result: Conversion) -> None:
    print_line(
        f"Wrote {output}: {result.layers} layers, {result.parameters:,} parameters, "
        + (f"relative error {result.total_error:.4f}" if result.errors else "exactly the same updates")
    )
    if result.errors:
        worst = max(result.errors, key=lambda name: result.errors[name])
        print_line(f"Largest error of a layer: {result.errors[worst]:.4f}, {worst}")
