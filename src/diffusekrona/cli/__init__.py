"""The commands. Each reads its options, calls the library, and prints what came of it."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import transformers
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import MofNCompleteColumn
from typer.core import TyperGroup

from ..architectures import ARCHITECTURES, PIPELINES, build
from ..base import default_device, load_base
from ..captions import write_metadata
from ..errors import KronAError
from ..evaluation import Encoders, evaluate_folders, find_images
from ..evaluation.encoders import CLIP, DINO
from ..evaluation.result import check_outputs
from ..files.convert import Conversion, Target
from ..files.convert import convert as convert_file
from ..files.extract import extract as extract_adapter
from ..files.inspect import METHODS, inspect_file
from ..files.merge_base import merge_into_files
from ..files.write import Format
from ..generation import generate_images
from ..pipeline import inject_krona, load_krona, merge_krona
from ..report import krona_report
from ..training import TrainingInterrupted
from ..training.plan import plan as plan_run
from ..training.plan import plan_table
from ..training.run import run, train_command
from ..training.settings import Settings, read_settings
from ..tuner.config import ATTENTION, KronAConfig
from .options import factor_pattern, with_settings
from .progress import class_images_progress, errors, progress, training_progress

console = Console()


def _stopped(interrupt: KeyboardInterrupt) -> str:
    if isinstance(interrupt, TrainingInterrupted) and interrupt.checkpoint is not None:
        again = train_command(interrupt.checkpoint.parents[1], resume=True)
        return f"{interrupt} Its state is in {interrupt.checkpoint}. To go on from there:\n{again}"
    return "Stopped before the end."


class Commands(TyperGroup):
    """Ends a command with one line instead of a traceback where the user can mend it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; exit code 1 for an error of ours or of the system, 130 for Ctrl-C."""
        try:
            return super().invoke(ctx)
        except (KronAError, OSError) as error:
            errors.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            errors.print(escape(_stopped(interrupt)), soft_wrap=True, highlight=False)
            raise typer.Exit(130) from interrupt


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)


class DType(str, Enum):
    """The types that weights can be loaded in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def in_torch(self) -> torch.dtype:
        """The type of this name."""
        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


@app.callback()
def main() -> None:
    """Kronecker adapters (ΔW = A ⊗ B) for Stable Diffusion and SDXL: train one on a few images, use it."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


Base = Annotated[str, typer.Option(help="Base model: a Diffusers pipeline folder, or its id on the hub.")]


@app.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
@with_settings
def train(
    config: Annotated[
        Path | None, typer.Option(help="YAML or TOML file of settings, by the names of the flags, which win over it.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the run would take; nothing is loaded.")] = False,
    **given: Any,
) -> None:
    """Teach a base model one subject from a few images (DreamBooth), and save the adapter."""
    settings = Settings.of({**(read_settings(config) if config else {}), **given})
    if plan:
        console.print(plan_table(plan_run(settings)))
        return
    with class_images_progress() as on_class_image, training_progress(settings.training.max_train_steps) as on_step:
        outcome = run(settings, on_step, on_class_image)
    if not outcome.saved:  # by another process
        return
    result, report = outcome.result, outcome.report
    console.print(
        f"Adapted {len(report.layers)} layers with {report.parameters:,} trainable parameters, "
        f"{report.share:.3%} of the base's; LoRA r=4 has {report.lora_parameters:,}.",
        soft_wrap=True,
    )
    console.print(
        f"{result.steps} steps on {result.images} images in {result.seconds:.1f} s, final loss {result.final_loss:.4f}",
        soft_wrap=True,
    )
    for path in outcome.saved:
        size = sum(file.stat().st_size for file in _adapter_files(path))
        console.print(f"Saved {escape(str(path))}, {decimal(size)}", soft_wrap=True)
    console.print(f"Report: {escape(str(outcome.page))}", soft_wrap=True)


@app.command()
def generate(
    base: Base,
    output: Annotated[Path, typer.Option(help="Folder for the images.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to show; repeatable.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file with one prompt per line.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    adapter: Annotated[Path | None, typer.Option(show_default="none", help="Adapter folder or file.")] = None,
    weight: Annotated[float, typer.Option(help="Strength of the adapter.")] = 1.0,
    merge: Annotated[bool, typer.Option(help="Merge the adapter into the weights, which makes it free.")] = True,
    images_per_prompt: Annotated[int, typer.Option(help="Images of each prompt, at seed, seed + 1, …")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of each prompt's first image.")] = 0,
    guidance_scale: Annotated[float, typer.Option(help="How closely to follow the prompt; 7 to 10 suits most.")] = 7.5,
    steps: Annotated[int, typer.Option(help="Denoising steps; 30 to 70 suit most.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Images per pass.")] = 1,
    height: Annotated[int | None, typer.Option(show_default="the base's", help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(show_default="the base's", help="Width in pixels.")] = None,
    device: Annotated[
        str | None, typer.Option(show_default="a GPU if any", help="Such as cuda, cuda:1 or cpu.")
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(show_default="float16 on a GPU, float32 on the CPU", help="Type of the weights."),
    ] = None,
) -> None:
    """Generate images from prompts, with or without an adapter."""
    asked = _prompts(prompt or [], prompts_file)
    repeated = [text for text in asked for _ in range(images_per_prompt)]
    seeds = [seed + index for _ in asked for index in range(images_per_prompt)]
    place = torch.device(device) if device else default_device()
    pipe = load_base(base, _dtype_for(place, dtype)).to(place)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        _use_adapter(pipe, adapter, weight, merge)
    output.mkdir(parents=True, exist_ok=True)
    with progress("Generating", total=None) as show:
        pictures = generate_images(
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
    entries: dict[str, dict[str, Any]] = {}
    for index, (picture, text, used) in enumerate(zip(pictures, repeated, seeds, strict=True)):
        path = output / f"{index:03d}-{_slug(text)}-seed{used}.png"
        picture.save(path)
        entries[path.name] = {"text": text, "seed": used}
        console.print(escape(str(path)), soft_wrap=True)
    write_metadata(output, entries)


@app.command()
def evaluate(
    real: Annotated[
        Path | None, typer.Option(help="The subject's photographs; or a subfolder of them for each subject.")
    ] = None,
    generated: Annotated[
        Path | None, typer.Option(help="Generated images with their prompts, as generate writes them; likewise.")
    ] = None,
    drop_word: Annotated[
        list[str] | None, typer.Option(help="Word to leave out of the prompts, such as sks; repeatable.")
    ] = None,
    base_images: Annotated[
        Path | None, typer.Option(help="For drift: the base's images of prompts without the subject.")
    ] = None,
    adapted_images: Annotated[
        Path | None, typer.Option(help="For drift: the same prompts and seeds with the adapter, by the same names.")
    ] = None,
    clip: Annotated[str, typer.Option(help="CLIP for CLIP-I and CLIP-T: a folder, a hub id, or id@revision.")] = CLIP,
    dino: Annotated[str, typer.Option(help="The encoder for DINO and drift, likewise.")] = DINO,
    output: Annotated[
        list[Path] | None,
        typer.Option(help="File to write: .json has every image's scores, .md the table; repeatable."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per pass.")] = 16,
    device: Annotated[
        str | None, typer.Option(show_default="a GPU if any", help="Such as cuda, cuda:1 or cpu.")
    ] = None,
) -> None:
    """Score generated images as the paper does: CLIP-I, CLIP-T and DINO; and the adapter's drift."""
    check_outputs(output or [])
    images = find_images(
        real, generated, drop_words=drop_word or [], base_images=base_images, adapted_images=adapted_images
    )
    place = torch.device(device) if device else default_device()
    encoders = Encoders(clip if images.subjects else None, dino, device=place, batch_size=batch_size)
    with progress("Encoding", MofNCompleteColumn(), total=None) as show:
        result = evaluate_folders(encoders, images, lambda done, total: show(completed=done, total=total))
    result.write(*(output or []))
    console.print(result.table())
    for path in output or []:
        console.print(escape(str(path)), soft_wrap=True)


@app.command()
def params(
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(ARCHITECTURES)}, or a pipeline folder or hub id.")
    ] = "sdxl",
    a1: Annotated[int, typer.Option(help="Rows of A; must divide every layer's outputs.")] = 4,
    a2: Annotated[int, typer.Option(help="Columns of A; must divide every layer's inputs.")] = 64,
    factors: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX=A1,A2", help="Other factors for some layers; repeatable."),
    ] = None,
    every_layer: Annotated[bool, typer.Option(help="One row per layer, not per kind of layer.")] = False,
) -> None:
    """Count what an adapter would train, without weights: shapes, parameters, ranks, cost, LoRA beside it."""
    target = build(model) if model in ARCHITECTURES else load_base(model, torch.float32)
    inject_krona(target, KronAConfig(a1=a1, a2=a2, factor_pattern=factor_pattern(factors or [])))
    console.print(krona_report(target).table(every_layer))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter file or folder, of any program.")],
    every_layer: Annotated[bool, typer.Option(help="One row per layer, not per kind of layer.")] = False,
) -> None:
    """Say what an adapter file is: method, shapes, ranks, norms, header, and what it can be converted to."""
    found = inspect_file(file)
    console.print(
        f"{escape(str(file))}: {METHODS[found.kind]}, {len(found.layers)} layers, {found.parameters:,} parameters, "
        f"norm {found.norm:.4g}",
        soft_wrap=True,
    )
    console.print(found.table(every_layer))
    for key, value in sorted(found.metadata.items()):
        console.print(escape(f"{key}: {value}"), soft_wrap=True)
    for become in found.becomes:
        console.print(f"Can become {become}", soft_wrap=True)


ToFormat = Annotated[
    Format, typer.Option(help="krona; lokr, for kohya's scripts, ComfyUI and their kin; or lokr-diffusers.")
]
Factors = Annotated[
    str | None, typer.Option(metavar="A1,A2", help="Approximate by the nearest Kronecker products of these factors.")
]
Budget = Annotated[
    float | None,
    typer.Option(help="Approximate with factors chosen by this many parameters; up to 1, a share of the source's."),
]
Terms = Annotated[
    int | None,
    typer.Option(show_default="1; within a budget, the best", help="Products to sum where it approximates."),
]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="An adapter file or folder, of any program.")],
    output: Annotated[
        Path, typer.Argument(help="What to write: a file that ends in .safetensors; KronA's also a folder.")
    ],
    to: ToFormat = "krona",
    model: Annotated[
        str | None,
        typer.Option(show_default="found out", help=f"{', '.join(PIPELINES)}, or the base's folder."),
    ] = None,
    factors: Factors = None,
    budget: Budget = None,
    num_terms: Terms = None,
) -> None:
    """Write an adapter in another format: exactly, or with --factors or --budget by the nearest Kronecker products."""
    target = _target(factors, budget, num_terms) if factors is not None or budget is not None else None
    if target is None and num_terms is not None:
        raise KronAError("--num-terms needs --factors or --budget.")
    with progress("Approximating", total=None) as show:
        result = convert_file(
            source, output, to, model, target, on_layer=lambda done, total: show(completed=done, total=total)
        )
    _print_conversion(output, result)


@app.command()
def extract(
    base: Annotated[Path, typer.Argument(help="The base's folder, in Diffusers' layout.")],
    tuned: Annotated[Path, typer.Argument(help="The same after a full fine-tune.")],
    output: Annotated[Path, typer.Argument(help="What to write; see convert.")],
    to: ToFormat = "krona",
    target_modules: Annotated[
        str, typer.Option(help="Which layers: attention, attention+ff, cross-attention, or a regular expression.")
    ] = ATTENTION,
    factors: Factors = None,
    budget: Budget = None,
    num_terms: Terms = None,
) -> None:
    """Write a full fine-tune as an adapter: the nearest Kronecker products to what it changed."""
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


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="A pipeline's folder, or a checkpoint file of SDXL or SD 1.x.")],
    adapter: Annotated[Path, typer.Argument(help="An adapter file or folder, of any program.")],
    output: Annotated[Path, typer.Argument(help="What to write, a folder or file as the base is.")],
    weight: Annotated[float, typer.Option(help="Strength of the adapter.")] = 1.0,
) -> None:
    """Write a model with an adapter merged into its weights, for good."""
    layers = merge_into_files(base, adapter, output, weight)
    console.print(f"Wrote {escape(str(output))}: {layers} layers changed", soft_wrap=True)


def _target(factors: str | None, budget: float | None, num_terms: int | None) -> Target:
    return Target(None if factors is None else _pair(factors), budget, num_terms)


def _print_conversion(output: Path, result: Conversion) -> None:
    console.print(
        f"Wrote {escape(str(output))}: {result.layers} layers, {result.parameters:,} parameters, "
        + (f"relative error {result.total_error:.4f}" if result.errors else "exactly the same updates"),
        soft_wrap=True,
    )
    if result.errors:
        worst = max(result.errors, key=lambda name: result.errors[name])
        console.print(f"Largest error of a layer: {result.errors[worst]:.4f}, {escape(worst)}", soft_wrap=True)


def _pair(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if found is None:
        raise KronAError(f"--factors takes A1,A2, such as 4,64, not {text!r}.")
    return int(found[1]), int(found[2])


def _prompts(given: list[str], file: Path | None) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    prompts = given + [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise KronAError("There is no prompt. Give --prompt, or --prompts-file with one per line.")
    return prompts


def _dtype_for(device: torch.device, dtype: DType | None) -> torch.dtype:
    if dtype is not None:
        return dtype.in_torch
    return torch.float32 if device.type == "cpu" else torch.float16


def _use_adapter(pipe: Any, path: Path, weight: float, merge: bool) -> None:
    load_krona(pipe, path)
    if weight != 1:
        pipe.set_adapters("default", adapter_weights=weight)
    if merge:
        merge_krona(pipe)


def _adapter_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.rglob("adapter_model.safetensors"))


def _slug(prompt: str, length: int = 40) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:length].strip("-") or "image"
