"""Does the base draw what it is asked for? Plain prompts and whole scenes, judged; and the contact sheet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from research.judges.classifier import Judge
from research.judges.scenes import obeyed, shares

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


def named_right(judge: Judge, pictures: Sequence[Image.Image], things: Sequence[int]) -> dict[str, float]:
    """Shares of pictures whose concept the classifier names as asked: first, and among five."""
    names, five = [concept.name for concept in concepts()], judge.name_concepts(pictures, best=5)
    first = [names[thing] == found[0] for thing, found in zip(things, five, strict=True)]
    among = [names[thing] in found for thing, found in zip(things, five, strict=True)]
    return {"concept_top1": round(float(np.mean(first)), 4), "concept_top5": round(float(np.mean(among)), 4)}


def obedience(judge: Judge, pictures: Sequence[Image.Image], asked: Sequence[Question]) -> dict[str, float]:
    """Shares of pictures that show what was asked: the concept, and all that the scene says."""
    seen = shares([obeyed(picture, words) for picture, words in zip(pictures, prompts(asked), strict=True)])
    scene = {name: round(share, 4) for name, share in seen.items()}
    return named_right(judge, pictures, [thing for thing, _ in asked]) | scene


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
