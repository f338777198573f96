"""`diffusekrona train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.settings import Settings, read_settings
from .console import console, errors, print_line
from .options import flags_of_training, with_flags
from .progress import class_images_progress, training_progress


@with_flags(flags_of_training())
def train(
    config: Annotated[
        Path | None, typer.Option(help="YAML or TOML file of settings, by the names of the flags, which win over it.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say how much memory the run would take; no weights are loaded.")
    ] = False,
    **given: Any,
) -> None:
    """Teach a base model one subject from a few images (DreamBooth), and save the adapter."""
    settings = Settings.of({**(read_settings(config) if config else {}), **given})
    if plan:
        from ..training.plan import plan as plan_run
        from ..training.plan import plan_table

        console.print(plan_table(plan_run(settings)))
    else:
        _run(settings)


def _run(settings: Settings) -> None:
    from rich.filesize import decimal

    from ..training.reports import left_out
    from ..training.run import run

    if (text := left_out()) is not None:
        errors.print(text, soft_wrap=True, markup=False)
    with class_images_progress() as on_class_image, training_progress() as on_step:
        outcome = run(settings, on_step, on_class_image)
    if not outcome.saved:  # by another process
        return
    result, report = outcome.result, outcome.report
    print_line(
        f"Adapted {len(report.layers)} layers with {report.parameters:,} trainable parameters, "
        f"{report.share:.3%} of the base's; LoRA r=4 has {report.lora_parameters:,}."
    )
    print_line(
        f"{result.steps} steps on {result.images} images in {result.seconds:.1f} s, final loss {result.final_loss:.4f}"
    )
    for path in outcome.saved:
        size = sum(file.stat().st_size for file in _adapter_files(path))
        print_line(f"Saved {path}, {decimal(size)}")
    print_line(f"Report: {outcome.page}")


def _adapter_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.rglob("adapter_model.safetensors"))
