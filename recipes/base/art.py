"""Emoji art: fetching it, the chosen concepts, and a renderer that pastes one of them on a flat background.

Pictures are RGB, 64 x 64 pixels, values in [-1, 1] once they are tensors (channels first).
"""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from research.judges.scenes import COLOURS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = HERE / ".cache"
PACKAGES = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
}
STYLES = ("google", "twitter")
TEDDY = "1f9f8"  # in no training set at all; the other subjects are in the autoencoder's alone
PIXELS = 64
SIZES = (40, 44, 48, 52, 56)  # sprite edge in pixels
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Concept:
    """One thing the base can draw: `image` is the code-point stem of its files, `kind` its class word."""

    image: str
    name: str
    kind: str


def concepts() -> list[Concept]:
    """The chosen concepts in label order, from `concepts.tsv`."""
    rows = (HERE / "concepts.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [Concept(*row.split("\t")) for row in rows]


def fetch() -> Path:
    """Install the pinned art packages with npm into the cache (once) and return their folder."""
    modules = CACHE / "npm" / "node_modules"
    missing = [name for name in PACKAGES if not (modules / name / "package.json").exists()]
    if missing:
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("npm is needed once, to install the emoji art packages")
        modules.parent.mkdir(parents=True, exist_ok=True)
        wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
        flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(modules.parent)]
        subprocess.run([npm, "install", *flags, *wanted], check=True)
    return modules


def art_path(style: str, image: str) -> Path:
    """The PNG (google, twitter; 64 px) or WebP (fluent; 256 px) file of one emoji."""
    modules = CACHE / "npm" / "node_modules"
    if style == "fluent":
        return modules / "@lobehub" / "fluent-emoji-3d" / "assets" / f"{image}.webp"
    return modules / f"emoji-datasource-{style}" / "img" / style / "64" / f"{image}.png"


def every_image() -> list[str]:
    """Stems of all emoji drawn in all three styles except the held-out bear: what the autoencoder sees."""
    text = (fetch() / "emoji-datasource-google" / "emoji.json").read_text(encoding="utf-8")
    entries = [e for e in json.loads(text) if all(e[f"has_img_{style}"] for style in STYLES)]
    stems = sorted(str(e["image"]).removesuffix(".png") for e in entries if e["category"] != "Flags")
    return [stem for stem in stems if stem != TEDDY and art_path("fluent", stem).is_file()]


def sprite(style: str, image: str, size: int) -> Floats:
    """One drawing as premultiplied RGBA in [0, 1], channels first: (4, size, size)."""
    with Image.open(art_path(style, image)) as file:
        rgba = np.asarray(file.convert("RGBA"), dtype=np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    channels = [Image.fromarray(np.ascontiguousarray(rgba[..., i])) for i in range(4)]
    small = [np.asarray(c.resize((size, size), Image.Resampling.LANCZOS)) for c in channels]
    return np.clip(np.stack(small), 0, 1).astype(np.float32)


class Renderer:
    """Draws `images` in the given styles; all sprites are kept resized in memory."""

    def __init__(self, images: list[str], styles: tuple[str, ...] = STYLES, sizes: tuple[int, ...] = SIZES) -> None:
        self.images, self.styles, self.sizes = images, styles, sizes
        self.sprites = {
            (i, s, z): sprite(style, image, z)
            for i, image in enumerate(images)
            for s, style in enumerate(styles)
            for z in sizes
        }

    def draw(self, index: int, style: int, colour: Floats, rng: np.random.Generator) -> Floats:
        """One picture in [0, 1], (3, 64, 64): the sprite at a random size and place on a flat `colour`."""
        size = int(rng.choice(self.sizes))
        top, left = (int(v) for v in rng.integers(0, PIXELS - size + 1, 2))
        return paste(self.sprites[index, style, size], top, left, flat(colour))


def flat(colour: Floats) -> Floats:
    """A picture of one colour, (3, 64, 64) in [0, 1]."""
    return np.broadcast_to(colour[:, None, None], (3, PIXELS, PIXELS)).copy()


def paste(drawing: Floats, top: int, left: int, picture: Floats) -> Floats:
    """Composite a premultiplied sprite over a picture, in place."""
    size = drawing.shape[-1]
    window = picture[:, top : top + size, left : left + size]
    window *= 1 - drawing[3:]
    window += drawing[:3]
    return picture


def background(name: str, rng: np.random.Generator, jitter: float = 6.0) -> Floats:
    """A named background colour in [0, 1], each channel moved by up to `jitter` levels of 255."""
    levels = np.asarray(COLOURS[name], np.float32) + rng.uniform(-jitter, jitter, 3)
    return np.clip(levels / 255, 0, 1).astype(np.float32)


def to_tensor(pictures: list[Floats]) -> torch.Tensor:
    """Pictures in [0, 1] to one float tensor (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)) * 2 - 1


def to_image(picture: Floats) -> Image.Image:
    """A (3, height, width) picture in [0, 1] as an 8-bit RGB image."""
    return Image.fromarray(np.clip(np.round(picture.transpose(1, 2, 0) * 255), 0, 255).astype(np.uint8))
