"""The drawings: fetching six sets of them, and a bank that holds every one at 128 x 128 pixels.

A drawing is its set and its name there. The bank keeps premultiplied RGBA of 8 bits, channels first. A drawing's longer
side fills its square, so that a size in pixels means the same in every set.
"""

import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = HERE / ".cache"
VECTORS = {  # sets of vector drawings, and their releases
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji": "1.2.7",
}
RENDERS = "fluent-emoji-3d"
PACKAGES = {f"@iconify-json/{name}": release for name, release in VECTORS.items()} | {f"@lobehub/{RENDERS}": "1.1.0"}
SETS = (*VECTORS, RENDERS)
FLUENT = ("fluent-emoji-flat", "fluent-emoji", RENDERS)  # one design, drawn three times
STYLES = {"noto": "painted", "noto-v1": "cartoon", "twemoji": "flat", RENDERS: "glossy"}
"""The sets that the denoiser learns, and the word that captions have for each."""

PIXELS = 128
BANK = CACHE / "bank.npy"
INDEX = CACHE / "bank.json"
UNWANTED = ("flag", "skin-tone", "regional-indicator")  # in names
SKIN_TONE = re.compile("(-(medium-)?(light|medium|dark))+$")  # so Fluent names its five copies of a drawing
Drawing = tuple[str, str]
"""Set, and name in it."""


@dataclass(frozen=True)
class Concept:
    """One thing the base can draw: `name` in captions, `drawing` in every set, `kind` its wider class."""

    name: str
    drawing: str
    kind: str


@dataclass(frozen=True)
class Subject:
    """A drawing to personalise on, which nothing is trained on.

    Attributes:
        name: of its pictures' folder.
        word: its class word in captions.
        set: whose drawing it is.
        drawing: its name there.
        kin: whether the class is known from the other sets.
        alike: names of drawings nearly the same, which stay out too.
    """

    name: str
    word: str
    set: str
    drawing: str
    kin: bool
    alike: tuple[str, ...]

    def hidden(self) -> set[Drawing]:
        """Every drawing that stays out of training because of this one."""
        sets = SETS if not self.kin else FLUENT if self.set in FLUENT else (self.set,)
        return {(name, drawing) for name in sets for drawing in (self.drawing, *self.alike)}


def rows(table: str) -> list[list[str]]:
    """The cells of a table of the recipe, without its heading."""
    return [line.split("\t") for line in (HERE / table).read_text(encoding="utf-8").splitlines()[1:]]


@cache
def concepts() -> tuple[Concept, ...]:
    """The chosen concepts in label order."""
    return tuple(Concept(*row) for row in rows("concepts.tsv"))


@cache
def subjects() -> tuple[Subject, ...]:
    """The subjects, in the table's order."""
    return tuple(
        Subject(name, word, of, drawing, kin == "yes", tuple(alike.split()))
        for name, word, of, drawing, kin, alike, _ in rows("subjects.tsv")
    )


@cache
def hidden() -> frozenset[Drawing]:
    """Drawings that nothing is trained on."""
    return frozenset().union(*(subject.hidden() for subject in subjects()))


def known_drawings() -> list[tuple[int, str, Drawing]]:
    """What the denoiser learns: number of the concept, word of the style, and the drawing."""
    return [
        (number, word, (name, concept.drawing))
        for number, concept in enumerate(concepts())
        for name, word in STYLES.items()
        if (name, concept.drawing) not in hidden()
    ]


def fetch() -> Path:
    """Install the pinned packages with npm into the cache (once) and return their folder."""
    modules = CACHE / "npm" / "node_modules"
    if not all((modules / name / "package.json").exists() for name in PACKAGES):
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("npm is needed once, to install the packages of drawings")
        modules.parent.mkdir(parents=True, exist_ok=True)
        wanted = [f"{name}@{release}" for name, release in PACKAGES.items()]
        flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(modules.parent)]
        subprocess.run([npm, "install", *flags, *wanted], check=True)
    return modules


@cache
def icons(name: str) -> dict[str, Any]:
    """A set's file of vector drawings."""
    path = fetch() / "@iconify-json" / name / "icons.json"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


@cache
def render_files() -> dict[str, Path]:
    """The 3D renders by the names that the flat set of the same design gives their characters."""
    folder = fetch() / "@lobehub" / RENDERS / "assets"
    by_stem = {file.stem.replace("-fe0f", ""): file for file in sorted(folder.glob("*.webp"))}
    characters = json.loads((fetch() / "@iconify-json" / FLUENT[0] / "chars.json").read_text(encoding="utf-8"))
    found = {name: by_stem.get(stem.replace("-fe0f", "")) for stem, name in characters.items()}
    return {name: file for name, file in found.items() if file is not None}


def names_in(name: str) -> list[str]:
    """The usable drawings of a set, each once."""
    every = set(render_files() if name == RENDERS else icons(name)["icons"])
    wanted = {drawing for drawing in every if not any(word in drawing for word in UNWANTED)}
    return sorted(
        drawing for drawing in wanted if not (SKIN_TONE.search(drawing) and SKIN_TONE.sub("", drawing) in every)
    )


def picture_of(drawing: Drawing) -> Image.Image:
    """One drawing, RGBA, 256 x 256."""
    name, title = drawing
    if name == RENDERS:
        with Image.open(render_files()[title]) as file:
            return file.convert("RGBA")
    import resvg_py

    book = icons(name)
    icon = book["icons"][title]
    left, top = icon.get("left", 0), icon.get("top", 0)
    box = f"{left} {top} {icon.get('width', book.get('width', 16))} {icon.get('height', book.get('height', 16))}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * PIXELS, height=2 * PIXELS)
    with Image.open(io.BytesIO(bytes(png))) as file:
        return file.convert("RGBA")


def sprite(drawing: Drawing, size: int = PIXELS) -> npt.NDArray[np.uint8]:
    """One drawing as premultiplied RGBA, channels first: (4, size, size)."""
    picture = picture_of(drawing)
    picture = squared(picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()))
    rgba = np.asarray(picture, dtype=np.float32)
    rgba = np.concatenate([rgba[..., :3] * rgba[..., 3:] / 255, rgba[..., 3:]], axis=-1)
    planes = [Image.fromarray(np.ascontiguousarray(rgba[..., i])) for i in range(4)]
    small = np.stack([np.asarray(plane.resize((size, size), Image.Resampling.LANCZOS)) for plane in planes])
    return np.clip(np.round(small), 0, 255).astype(np.uint8)


def squared(picture: Image.Image) -> Image.Image:
    """A picture in the middle of the smallest square that holds it."""
    edge = max(picture.size)
    square = Image.new("RGBA", (edge, edge))
    square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return square


def every_drawing() -> list[Drawing]:
    """All drawings of all sets in the bank's order, the hidden ones too."""
    return [(name, drawing) for name in SETS for drawing in names_in(name)]


def make_bank() -> None:
    """Draw every drawing once; a minute."""
    if INDEX.exists():
        return
    drawings = every_drawing()
    bank = np.lib.format.open_memmap(BANK, "w+", np.uint8, (len(drawings), 4, PIXELS, PIXELS))
    for number, drawing in enumerate(drawings):
        bank[number] = sprite(drawing)
    bank.flush()
    INDEX.write_text(json.dumps(drawings), encoding="utf-8")


@cache
def bank() -> torch.Tensor:
    """All drawings, (n, 4, 128, 128) of bytes, read from the disk as needed."""
    return torch.from_numpy(np.load(BANK, mmap_mode="c"))


@cache
def places() -> dict[Drawing, int]:
    """Where each drawing is in the bank."""
    return {(name, drawing): n for n, (name, drawing) in enumerate(json.loads(INDEX.read_text(encoding="utf-8")))}
