"""`diffusekrona generate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import MofNCompleteColumn

from ..errors import KronAError
from ..inputs.texts import read_text
from ..schema import DType
from ..training.settings import DataSettings
from .console import print_line
from .options import help_of
from .progress import progress

if TYPE_CHECKING:
    import torch

Device = Annotated[
    str | None, typer.Option(show_default="a GPU if any", help="Device to compute on, such as cuda, cuda:1 or cpu.")
]


def generate(
    base: Annotated[str, typer.Option(help=help_of(DataSettings, "pretrained_model_name_or_path"))],
    output: Annotated[Path, typer.Option(help="Folder that the images are written to.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt of an image; repeatable.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt per line.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(show_default="none", help="Text that says what the images should not show.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(show_default="none", help="Adapter to generate with, a folder or a file.")
    ] = None,
    weight: Annotated[
        float, typer.Option(help="Strength of the adapter: 0 is without it, 1 is as it was trained.")
    ] = 1.0,
    merge: Annotated[
        bool, typer.Option(help="Merge the adapter into the weights, after which it takes no more time.")
    ] = True,
    images_per_prompt: Annotated[
        int, typer.Option(min=1, help="Number of images of each prompt, with the seeds seed, seed + 1, …, each.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of each prompt's first image.")] = 0,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            show_default="7.5 for Stable Diffusion 1.x, 2.x and SDXL, the pipeline's own for others",
            help="Guidance scale: how closely to follow the prompt.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(show_default="50 for these, the pipeline's own for others", help="Number of denoising steps."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of images that are drawn in one pass.")] = 1,
    height: Annotated[
        int | None, typer.Option(show_default="the base's", help="Height of the images in pixels.")
    ] = None,
    width: Annotated[int | None, typer.Option(show_default="the base's", help="Width of the images in pixels.")] = None,
    device: Device = None,
    dtype: Annotated[
        DType | None,
        typer.Option(show_default="float16 on a GPU, float32 on the CPU", help="Type that weights are loaded in."),
    ] = None,
) -> None:
    """Generate images from prompts, with or without an adapter."""
    from ..bases.loading import load_base
    from ..generation import generated
    from ..inputs.captions import write_metadata
    from ..inputs.images import image_png
    from ..storage import write_whole

    asked = _prompts(prompt or [], prompts_file)
    repeated = [text for text in asked for _ in range(images_per_prompt)]
    seeds = [seed + index for _ in asked for index in range(images_per_prompt)]
    place = chosen_device(device)
    pipe = load_base(base, _dtype_for(place, dtype)).to(place)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        _use_adapter(pipe, adapter, weight, merge)
    output.mkdir(parents=True, exist_ok=True)
    with progress("Generating", MofNCompleteColumn(), total=None) as show:
        pictures = generated(
            pipe,
            repeated,
            seeds,
            guidance_scale=guidance_scale,
            steps=steps,
            batch_size=batch_size,
            height=height,
            width=width,
            negative_prompt=negative_prompt,
            on_step=lambda done, total: show(completed=done, total=total),
        )
        # Each is kept when it is done, so that stopping loses none.
        for index, (picture, text, used) in enumerate(zip(pictures, repeated, seeds, strict=True), _next_index(output)):
            path = output / f"{index:03d}-{_slug(text)}-seed{used}.png"
            write_whole({path: image_png(picture)})
            write_metadata(output, {path.name: {"text": text, "seed": used}})
            print_line(str(path))


def _next_index(folder: Path) -> int:
    """After the numbers of the images that are there, so that none is replaced."""
    numbers = [int(found[1]) for path in folder.glob("*.png") if (found := re.match(r"(\d{3,})-", path.name))]
    return max(numbers, default=-1) + 1


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, or else a GPU if there is one."""
    import torch

    from ..bases.loading import default_device

    return torch.device(name) if name else default_device()


def _prompts(given: list[str], file: Path | None) -> list[str]:
    lines = read_text(file, "prompts file").split("\n") if file else []
    prompts = given + [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise KronAError("There is no prompt. Give --prompt, or --prompts-file with one per line.")
    return prompts


def _dtype_for(device: torch.device, dtype: DType | None) -> torch.dtype:
    import torch

    name = dtype or ("float32" if device.type == "cpu" else "float16")
    return getattr(torch, name)  # type: ignore[no-any-return]


def _use_adapter(pipe: Any, path: Path, weight: float, merge: bool) -> None:
    from ..pipeline import load_krona, merge_krona

    load_krona(pipe, path)
    if weight != 1:
        pipe.set_adapters("default", adapter_weights=weight)
    if merge:
        merge_krona(pipe)


def _slug(prompt: str, length: int = 40) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:length].strip("-") or "image"
