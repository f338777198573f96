"""`diffusekrona evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import MofNCompleteColumn

from ..evaluation import CLIP, DINO, VGG16, SheetSettings
from .console import console, errors, print_line
from .generate import Device, chosen_device
from .options import flags_of, with_flags
from .progress import progress


@with_flags(flags_of(SheetSettings))
def evaluate(
    real: Annotated[
        Path | None, typer.Option(help="Folder of the subject's photographs, or of one such folder for each subject.")
    ] = None,
    generated: Annotated[
        Path | None,
        typer.Option(help="Folder of images that generate wrote, with their prompts, or of one for each subject."),
    ] = None,
    drop_word: Annotated[
        list[str] | None,
        typer.Option(help="Word that CLIP-T leaves out of the prompts, such as sks; repeatable."),
    ] = None,
    base_images: Annotated[
        Path | None, typer.Option(help="For drift, a folder of the base's images of prompts without the subject.")
    ] = None,
    adapted_images: Annotated[
        Path | None,
        typer.Option(help="For drift, a folder of the adapter's images by the same names, prompts and seeds."),
    ] = None,
    clip: Annotated[
        str, typer.Option(help="Encoder for CLIP-I and CLIP-T: a folder, a hub id, or hub-id@revision.")
    ] = CLIP,
    dino: Annotated[
        str, typer.Option(help="Encoder for DINO and drift: a folder, a hub id, or hub-id@revision.")
    ] = DINO,
    lpips: Annotated[
        str | None,
        typer.Option(
            show_default="LPIPS is not measured",
            help="Weights of torchvision's vgg16 or alexnet, with which LPIPS is measured: a safetensors file, its "
            f"folder, or a hub id such as {VGG16}.",
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(help="File to write: .json holds every image's scores, .md the table; repeatable."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of images that are encoded in one pass.")] = 16,
    device: Device = None,
    **given: Any,
) -> None:
    """Score generated images as the paper does: CLIP-I, CLIP-T and DINO; and the adapter's drift."""
    from ..evaluation import Encoders, draw_sheet, evaluate_folders, find_images
    from ..evaluation.evaluate import check_asked
    from ..evaluation.result import check_outputs
    from ..evaluation.sheet import left_out
    from ..storage import write_whole

    check_outputs(output or [])
    sheet = SheetSettings(**given) if given else None
    images = find_images(
        real, generated, drop_words=drop_word or [], base_images=base_images, adapted_images=adapted_images
    )
    check_asked(images, lpips, sheet)
    if sheet is not None and (line := left_out(sheet.sheet)):
        errors.print(line, soft_wrap=True, markup=False, highlight=False)
        sheet = None
    encoders = Encoders(
        clip if images.subjects else None, dino, lpips=lpips, device=chosen_device(device), batch_size=batch_size
    )
    with progress("Encoding", MofNCompleteColumn(), total=None) as show:
        result = evaluate_folders(encoders, images, lambda done, total: show(completed=done, total=total))
    pictures = {sheet.sheet: draw_sheet(result, images, sheet)} if sheet is not None else {}
    result.write(*(output or []))
    write_whole(pictures)
    console.print(result.table())
    for path in [*(output or []), *pictures]:
        print_line(str(path))
