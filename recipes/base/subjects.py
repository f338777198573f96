"""The subjects to personalise on: Fluent 3D drawings that neither the denoiser nor a judge has seen."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .art import ROOT, TEDDY, background, flat, paste, sprite, to_image
from .scenes import Scene

FOLDER = ROOT / "examples" / "subjects"
TOY_BEAR = ROOT / "examples" / "toy-bear"
NAME = "sks"  # a word that no caption has


@dataclass(frozen=True)
class Subject:
    """`image` is the code-point stem of its file, `kind` its class word."""

    name: str
    image: str
    kind: str


SUBJECTS = (
    Subject("toy-bear", TEDDY, "toy"),
    Subject("otter", "1f9a6", "animal"),
    Subject("goose", "1fabf", "bird"),
    Subject("teapot", "1fad6", "thing"),
    Subject("pickup", "1f6fb", "vehicle"),
    Subject("boot", "1f462", "garment"),
    Subject("llama", "1f999", "animal"),
    Subject("robot", "1f916", "toy"),
    Subject("soda", "1f964", "drink"),
)
VIEWS = (  # colour, edge, top, left
    ("blue", 56, 4, 4),
    ("yellow", 48, 15, 1),
    ("green", 56, 6, 8),
    ("white", 48, 2, 15),
    ("red", 52, 9, 6),
)


def draw_subject(subject: Subject, folder: Path) -> None:
    """Five pictures, placed by hand, each with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (colour, edge, top, left) in enumerate(VIEWS):
        ground = flat(background(colour, np.random.default_rng(0), jitter=0))
        picture = paste(sprite("fluent", subject.image, edge), top, left, ground)
        to_image(picture).save(folder / f"{number}-{colour}.png")
        caption = Scene(colour).caption(f"{NAME} {subject.kind}")
        (folder / f"{number}-{colour}.txt").write_text(caption + "\n", encoding="utf-8")


def draw_all() -> None:
    """All subjects; the bear where the demo expects it."""
    for subject in SUBJECTS:
        draw_subject(subject, TOY_BEAR if subject.image == TEDDY else FOLDER / subject.name)
