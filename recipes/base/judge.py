"""Does the base draw what it is asked for? 300 prompts, judged by the classifier; and the contact sheet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from diffusekrona.evaluation.judge import Judge

from .art import COLOURS, PIXELS, Concept, concepts
from .scenes import Scene

STEPS = 20
GUIDANCE = 3.0  # best of 3, 4 and 6 on other questions (seed 12)
Question = tuple[int, int]  # concept number, colour number


def questions(count: int, seed: int = 11) -> list[Question]:
    """Random concepts (none twice while they last) with random backgrounds."""
    rng, things = np.random.default_rng(seed), len(concepts())
    order = np.concatenate([rng.permutation(things) for _ in range(-(-count // things))])[:count]
    return [(int(thing), int(rng.integers(len(COLOURS)))) for thing in order]


def prompts(asked: Sequence[Question]) -> list[str]:
    """The questions in words."""
    chosen: list[Concept] = concepts()
    return [Scene(list(COLOURS)[colour]).caption(chosen[thing].name) for thing, colour in asked]


def obedience(judge: Judge, pictures: Sequence[Image.Image], asked: Sequence[Question]) -> dict[str, float]:
    """Shares of pictures whose concept (first, among five) and background are what was asked."""
    things, colours = [c.name for c in concepts()], list(COLOURS)
    named = [
        (things[thing] == five[0], things[thing] in five)
        for (thing, _), five in zip(asked, judge.name_concepts(pictures, best=5), strict=True)
    ]
    grounds = [
        colours[colour] == name for (_, colour), name in zip(asked, judge.name_backgrounds(pictures), strict=True)
    ]
    first, among = np.mean(named, axis=0)
    return {
        "concept_top1": round(float(first), 4),
        "concept_top5": round(float(among), 4),
        "background": round(float(np.mean(grounds)), 4),
    }


def contact_sheet(pictures: Sequence[Image.Image], texts: list[str], path: Path, columns: int = 8) -> None:
    """Save the pictures, twice enlarged, each over its prompt."""
    width, height = 2 * PIXELS + 12, 2 * PIXELS + 34
    rows = -(-len(texts) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen, edge = ImageDraw.Draw(sheet), 2 * PIXELS
    for number, (picture, words) in enumerate(zip(pictures, texts, strict=True)):
        left, top = number % columns * width + 6, number // columns * height + 6
        sheet.paste(picture.resize((edge, edge), Image.Resampling.BICUBIC), (left, top))
        subject, _, ground = words.partition(" on ")
        words = f"{subject}\non {ground}" if ground else subject
        pen.text((left, top + edge + 2), words, "black", font_size=10)
    sheet.save(path, optimize=True)
