"""Does the base draw what it is asked for? Plain prompts and whole scenes, judged; and the contact sheet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from diffusekrona.evaluation.judge import Judge
from diffusekrona.evaluation.scenes import obeyed, shares

from .art import COLOURS, PIXELS, concepts
from .scenes import Scene, random_scene

STEPS = 20
GUIDANCE = 3.0  # best of 3, 4 and 6 on other questions (seed 12)
Question = tuple[int, Scene]  # concept number, and how it is to be drawn


def plain_questions(count: int, seed: int = 11) -> list[Question]:
    """Random concepts (none twice while they last) on random backgrounds."""
    rng, things = np.random.default_rng(seed), len(concepts())
    order = np.concatenate([rng.permutation(things) for _ in range(-(-count // things))])[:count]
    return [(int(thing), Scene(list(COLOURS)[int(rng.integers(len(COLOURS)))])) for thing in order]


def scene_questions(count: int, seed: int = 13) -> list[Question]:
    """Random concepts of which a size, a place or a number is asked, too."""
    rng, asked = np.random.default_rng(seed), plain_questions(count, seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene.size or scene.place or scene.times > 1:
            scenes.append(scene)
    return [(thing, scene) for (thing, _), scene in zip(asked, scenes, strict=True)]


def prompts(asked: Sequence[Question]) -> list[str]:
    """The questions in words."""
    names = [concept.name for concept in concepts()]
    return [scene.caption(names[thing]) for thing, scene in asked]


def obedience(judge: Judge, pictures: Sequence[Image.Image], asked: Sequence[Question]) -> dict[str, float]:
    """Shares of pictures that show what was asked: the concept (first, among five), and all that the scene says."""
    names = [concept.name for concept in concepts()]
    named = [
        (names[thing] == five[0], names[thing] in five)
        for (thing, _), five in zip(asked, judge.name_concepts(pictures, best=5), strict=True)
    ]
    first, among = np.mean(named, axis=0)
    seen = shares([obeyed(picture, words) for picture, words in zip(pictures, prompts(asked), strict=True)])
    found = {"concept_top1": float(first), "concept_top5": float(among)} | seen
    return {name: round(share, 4) for name, share in found.items()}


def contact_sheet(shown: Sequence[tuple[Image.Image, str]], path: Path, columns: int = 8) -> None:
    """Save pictures, twice enlarged, each over its prompt."""
    width, height = 2 * PIXELS + 12, 2 * PIXELS + 34
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen, edge = ImageDraw.Draw(sheet), 2 * PIXELS
    for number, (picture, words) in enumerate(shown):
        left, top = number % columns * width + 6, number // columns * height + 6
        sheet.paste(picture.resize((edge, edge), Image.Resampling.BICUBIC), (left, top))
        subject, _, ground = words.partition(" on ")
        words = f"{subject}\non {ground}" if ground else subject
        pen.text((left, top + edge + 2), words, "black", font_size=10)
    sheet.save(path, optimize=True)
