"""Does the base draw what it is asked for? 300 prompts, judged by the classifier; and the contact sheet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw

from . import classifier
from .art import COLOURS, PIXELS, Concept, concepts
from .captions import caption

STEPS = 25
GUIDANCE = 5.0
Question = tuple[int, int]  # concept number, colour number


def questions(count: int, seed: int = 11) -> list[Question]:
    """Random concepts (none twice while they last) with random backgrounds."""
    rng, things = np.random.default_rng(seed), len(concepts())
    order = np.concatenate([rng.permutation(things) for _ in range(-(-count // things))])[:count]
    return [(int(thing), int(rng.integers(len(COLOURS)))) for thing in order]


def prompts(asked: Sequence[Question]) -> list[str]:
    """The questions in words."""
    chosen: list[Concept] = concepts()
    return [caption(chosen[thing].name, list(COLOURS)[colour]) for thing, colour in asked]


def generate(
    pipe: StableDiffusionXLPipeline,
    texts: list[str],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
) -> torch.Tensor:
    """One picture per prompt, (n, 3, 64, 64) in [-1, 1]; the seed fixes every picture's noise."""
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(texts), 50):
        part = texts[start : start + 50]
        draws = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        out = pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=draws, output_type="pt")
        pictures.append(out.images.float().cpu() * 2 - 1)
    return torch.cat(pictures)


def obedience(pictures: torch.Tensor, asked: Sequence[Question]) -> dict[str, float]:
    """Shares of pictures whose concept (first, among five) and background are what was asked."""
    top, ground = classifier.ranks(classifier.load(), pictures)
    things, colours = (torch.tensor(column) for column in zip(*asked, strict=True))
    hits = top == things[:, None]
    return {
        "prompts": len(asked),
        "concept_top1": round(float(hits[:, 0].float().mean()), 4),
        "concept_top5": round(float(hits.any(-1).float().mean()), 4),
        "background": round(float((ground == colours).float().mean()), 4),
    }


def contact_sheet(pictures: torch.Tensor, texts: list[str], path: Path, columns: int = 8) -> None:
    """Save the pictures, twice enlarged, each over its prompt."""
    width, height = 2 * PIXELS + 12, 2 * PIXELS + 34
    rows = -(-len(texts) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen, edge = ImageDraw.Draw(sheet), 2 * PIXELS
    for number, (picture, words) in enumerate(zip(pictures, texts, strict=True)):
        left, top = number % columns * width + 6, number // columns * height + 6
        levels = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(levels).resize((edge, edge), Image.Resampling.BICUBIC), (left, top))
        subject, _, ground = words.partition(" on ")
        words = f"{subject}\non {ground}" if ground else subject
        pen.text((left, top + edge + 2), words, "black", font_size=10)
    sheet.save(path, optimize=True)
