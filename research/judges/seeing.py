"""What the judges of drawings see: `python -m research.judges.seeing` scores every subject, real and spoilt.

It prints a table for each score, of means over places, sizes and backgrounds, and how long a picture takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from PIL import Image

from ..subjects import HERE, Subject, subjects
from .overlay import Overlay
from .scenes import COLOURS
from .spoiling import blob, blurred, erased, from_image, moved, on_colour
from .which_drawing import WhichDrawing

ENCODER = Path(__file__).parents[2] / "models" / "drawings-encoder"
VIEWS = ((96, (18, 9), "green"), (96, (26, 30), "gray"), (112, (8, 10), "purple"))
"""Edge of the drawing, its left and top, and the background."""

SMALL = (54, (60, 40), "green")
DECODED = {"decoded": VIEWS[0], "small, decoded": SMALL}
"""Pictures that went through the base's autoencoder; `recipes/drawings` writes them beside the drawings."""


def shown(subject: Subject) -> dict[str, list[Image.Image]]:
    """Pictures of a subject by what is wrong with them; those of "other style" show its kin, one after another."""
    true, views = from_image(subject.drawing()), VIEWS
    drawings = {
        "true": [true],
        "face erased": [erased(true, subject.eyes + subject.face)],
        "eyes moved": [moved(true, subject.eyes, subject.ways)],
        "blurred": [blurred(true, 12)],
        "other style": [from_image(kin) for kin in subject.kin()],
        "blob": [blob(true)],
    }
    found = {
        name: [on(drawing, *view) for drawing in listed for view in views] for name, listed in drawings.items()
    } | {"small": [on(true, *SMALL)]}
    for name in DECODED:
        with Image.open(HERE / subject.name / f"{name.replace(', ', '-')}.jpg") as image:
            found[name] = [image.convert("RGB")]
    return found | {"background": [Image.new("RGB", (128, 128), COLOURS[colour]) for _, _, colour in views]}


def on(drawing: torch.Tensor, edge: int, corner: tuple[int, int], colour: str) -> Image.Image:
    """A picture of a drawing on a named colour."""
    return on_colour(drawing, edge, corner, [level / 255 for level in COLOURS[colour]])


def table(scores: dict[str, Callable[[Image.Image], float]]) -> list[str]:
    """Lines of a table: a subject's mean score of each kind of picture, given the score of each subject."""
    rows = {
        name: {kind: mean(score(image) for image in images) for kind, images in shown(subjects()[name]).items()}
        for name, score in scores.items()
    }
    kinds = list(next(iter(rows.values())))
    rows["mean"] = {kind: mean(row[kind] for row in rows.values()) for kind in kinds}
    lines = [f"| subject | {' | '.join(kinds)} |", "| --- |" + " --- |" * len(kinds)]
    return lines + [f"| {name} | {' | '.join(f'{row[kind]:.2f}' for kind in kinds)} |" for name, row in rows.items()]


def _overlaid(subject: Subject) -> Callable[[Image.Image], float]:
    overlay = Overlay(subject.drawing())
    return lambda image: overlay.lay(image).score


def _named(subject: Subject) -> Callable[[Image.Image], float]:
    which = WhichDrawing(ENCODER, subject.twelve())
    return lambda image: which.ask(image)[0]


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    for title, scorer in (("Laid over the true drawing", _overlaid), ("Which of twelve drawings", _named)):
        scores = {name: scorer(subject) for name, subject in subjects().items()}
        began = time.process_time()
        lines = table(scores)
        pictures = sum(len(images) for subject in subjects().values() for images in shown(subject).values())
        print(f"{title}, {(time.process_time() - began) / pictures:.2f} s of one core for a picture\n", flush=True)
        print("\n".join(lines) + "\n", flush=True)


if __name__ == "__main__":
    main()
