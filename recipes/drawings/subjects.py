"""The pictures of the subjects to personalise on: drawings that neither the base nor its judge has seen."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from research import subjects as drawn
from research.judges import seeing, spoiling

from . import art, pictures, vae
from .art import CACHE, STYLES, Subject
from .scenes import Scene

FOLDER = CACHE / "subjects"
NAME = "sks"  # a word that no caption has
VIEWS = (  # scene, edge, top, left
    (Scene("blue"), 96, 16, 16),
    (Scene("yellow"), 96, 16, 16),
    (Scene("white"), 96, 16, 16),
    (Scene("green", place="left"), 64, 32, 0),
    (Scene("red", place="bottom"), 64, 64, 32),
)


def draw_subject(subject: Subject, folder: Path) -> None:
    """Five pictures, placed by hand, each with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    number, rng = art.places()[subject.set, subject.drawing], np.random.default_rng(0)
    for view, (scene, edge, top, left) in enumerate(VIEWS):
        assert scene.colour is not None
        picture = pictures.flat(pictures.named(scene.colour, rng, jitter=0))
        pictures.paste(picture, pictures.resized(number, edge), top, left)
        pictures.to_image(picture).save(folder / f"{view}-{scene.colour}.png")
        caption = scene.caption(f"{NAME} {subject.word}")
        (folder / f"{view}-{scene.colour}.txt").write_text(caption + "\n", encoding="utf-8")


def save_drawings(subject: Subject, folder: Path) -> None:
    """The subject as it was drawn, and its kin in 256 colours."""
    (folder / "kin").mkdir(parents=True, exist_ok=True)
    for name in STYLES:
        if (name, subject.drawing) not in art.places():
            continue
        drawing = spoiling.to_image(art.bank()[art.places()[name, subject.drawing]].float() / 255)
        if name == subject.set:
            drawing.save(folder / "true.png", optimize=True)
        else:
            drawing.quantize(256, Image.Quantize.FASTOCTREE).save(folder / "kin" / f"{name}.png", optimize=True)


def draw_all() -> None:
    """Folders for each subject: its pictures in the cache, its drawings where judges look for them."""
    for subject in art.subjects():
        draw_subject(subject, FOLDER / subject.name)
        save_drawings(subject, drawn.HERE / subject.name)


def save_decoded(network: AutoencoderKL) -> None:
    """What the autoencoder makes of a picture and of a small one of each subject, beside its drawings."""
    for subject in drawn.subjects().values():
        for name, view in seeing.DECODED.items():
            shown = seeing.on(spoiling.from_image(subject.drawing()), *view)
            levels = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255
            decoded = vae.decoded(network, pictures.to_network([levels]))[0].cpu() / 2 + 0.5
            file = drawn.HERE / subject.name / f"{name.replace(', ', '-')}.jpg"
            pictures.to_image(decoded).save(file, quality=95, subsampling=0)
