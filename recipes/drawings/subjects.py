"""The pictures of the subjects to personalise on: drawings that neither the base nor its judge has seen."""

from pathlib import Path

import numpy as np

from . import art, pictures
from .art import CACHE, Subject
from .scenes import Scene

FOLDER = CACHE / "subjects"
NAME = "sks"  # a word that no caption has
VIEWS = (  # colour, edge, top, left
    ("blue", 112, 8, 8),
    ("yellow", 92, 30, 4),
    ("green", 112, 12, 14),
    ("white", 92, 4, 30),
    ("red", 104, 18, 12),
)


def draw_subject(subject: Subject, folder: Path) -> None:
    """Five pictures, placed by hand, each with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    number, rng = art.places()[subject.set, subject.drawing], np.random.default_rng(0)
    for view, (colour, edge, top, left) in enumerate(VIEWS):
        picture = pictures.flat(pictures.named(colour, rng, jitter=0))
        pictures.paste(picture, pictures.resized(number, edge), top, left)
        pictures.to_image(picture).save(folder / f"{view}-{colour}.png")
        caption = Scene(colour).caption(f"{NAME} {subject.word}")
        (folder / f"{view}-{colour}.txt").write_text(caption + "\n", encoding="utf-8")


def draw_all() -> None:
    """A folder for each subject."""
    for subject in art.subjects():
        draw_subject(subject, FOLDER / subject.name)
