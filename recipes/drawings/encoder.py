"""The encoder that tells drawings apart, and a drawing from a spoilt one (`research/judges/which_drawing.py`).

It learns from every drawing but the hidden ones: of 24 drawings, many of them kin, or none, it must say which a picture
shows. Right pictures are a little soft, tinted and bent, or went through the autoencoder; to spoilt ones "none" is the
answer.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from recipes.base.training import save_half
from research.judges import spoiling
from research.judges.spoiling import Part
from research.judges.which_drawing import view_of

from . import art, pictures, subjects, vae
from .art import ROOT
from .training import Run, mixed, note, pick_device

DRAWINGS = 24  # of a step
STEPS = 2_000
SCHEDULE = (2e-3, 0.0, 100)
FEATURES = 128
FOLDER = ROOT / "models" / "drawings-encoder"
EDGES = (46, 122)
CERTAINTY = 0.98
"""Of a picture that is just as its drawing. The learned threshold is stricter: some spoilt pictures differ from right
ones in nothing that is left at their size, above all through the autoencoder."""

DECODED = 640  # pairs of pictures through the autoencoder, made before
Pair = tuple[Tensor, Tensor, Tensor]
"""Views of a drawing, of a right picture of it, and of a spoilt one."""


def build() -> ResNetForImageClassification:
    """A small basic-block ResNet whose logits are features, with the scale and the threshold of their cosines."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="basic", num_labels=FEATURES
    )
    return ResNetForImageClassification(config)


class Scale(nn.Module):
    """What turns cosines into logits, and the cosine of "none"."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        self.threshold = nn.Parameter(torch.tensor(0.4))

    def forward(self, asked: Tensor, drawings: Tensor) -> Tensor:
        """Logits (n, m + 1) of n pictures' features for m drawings' and none."""
        cosines = F.normalize(asked, dim=-1) @ F.normalize(drawings, dim=-1).T
        none = self.threshold.expand(len(asked), 1)
        return self.log_scale.exp() * torch.cat([cosines, none], dim=1)


def detailed_parts(drawing: Tensor, rng: np.random.Generator, count: int) -> list[Part]:
    """Random parts of a drawing, where its detail is, inside its outline."""
    edge = drawing.shape[-1]
    mean = F.avg_pool2d(drawing, 5, 1, 2)
    inside = (F.avg_pool2d(drawing[3:], 7, 1, 3) > 0.99)[0]
    detail = ((drawing - mean)[:3].abs().sum(0) * inside).flatten().double() + 1e-6
    parts = []
    for place in rng.choice(edge * edge, count, p=(detail / detail.sum()).numpy()):
        row, column = divmod(int(place), edge)
        high, wide = rng.uniform(0.05, 0.11, 2)
        top, left = row / edge, column / edge
        parts.append((max(0, left - wide), max(0, top - high), min(1, left + wide), min(1, top + high)))
    return parts


def spoilt(drawing: Tensor, rng: np.random.Generator) -> Tensor:
    """A drawing with something wrong that can be seen at half its size."""
    kind = rng.choice(6, p=(0.2, 0.25, 0.2, 0.15, 0.1, 0.1))
    if kind == 0:
        return spoiling.blurred(drawing, int(rng.integers(7, 16)))
    if kind == 1:
        return spoiling.erased(drawing, detailed_parts(drawing, rng, int(rng.integers(3, 9))))
    if kind == 2:
        parts = detailed_parts(drawing, rng, int(rng.integers(2, 5)))
        turns, far = rng.uniform(0, 2 * np.pi, len(parts)), rng.uniform(0.09, 0.18, len(parts))
        return spoiling.moved(drawing, parts, list(zip(far * np.cos(turns), far * np.sin(turns), strict=True)))
    if kind == 3:
        mixing = torch.from_numpy(rng.dirichlet((0.6, 0.6, 0.6), 3).astype(np.float32))
        return spoiling.recoloured(drawing, mixing)
    return spoiling.blob(drawing) if kind == 4 else warped(drawing, rng, 0.1)


def warped(drawing: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """A drawing pulled about: by up to about `strength` of its edge."""
    coarse = torch.from_numpy(rng.normal(0, strength, (1, 2, 6, 6)).astype(np.float32))
    field = F.interpolate(coarse, drawing.shape[-2:], mode="bicubic").permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3)[None], [1, 4, *drawing.shape[-2:]], align_corners=False)
    return F.grid_sample(drawing[None], still + field, align_corners=False)[0]


def varied(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """A picture in [0, 1], a little soft, tinted and grainy."""
    tint = torch.from_numpy(rng.uniform(0.95, 1.05, (3, 1, 1)).astype(np.float32))
    soft = F.avg_pool2d(F.pad(picture[None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
    picture = picture + float(rng.random()) * (soft - picture)
    return (picture * tint + 0.01 * torch.randn(picture.shape)).clamp(0, 1)


class Painter:
    """Pictures to train on."""

    def __init__(self, network: vae.AutoencoderKL) -> None:
        self.every = [number for drawing, number in art.places().items() if drawing not in art.hidden()]
        self.kin: dict[str, list[int]] = {}
        known = set(self.every)
        for (_, name), number in art.places().items():
            if number in known:
                self.kin.setdefault(name, []).append(number)
        self.families = [numbers for numbers in self.kin.values() if len(numbers) > 2]
        self.decoded = self.through(network)

    def pictures_of(self, number: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A drawing, another with a little bend, and a spoilt one, at one size and place on one colour."""
        edge = int(rng.integers(EDGES[0], EDGES[1] + 1))
        top, left = (int(offset) for offset in rng.integers(0, art.PIXELS - edge + 1, 2))
        colour, drawing = vae.random_colour(rng), art.bank()[number].float() / 255
        made = []
        for one in (drawing, warped(drawing, rng, 0.008) if rng.random() < 0.5 else drawing, spoilt(drawing, rng)):
            picture = pictures.flat(colour)
            pictures.paste(picture, spoiling.resized(one, edge), top, left)
            made.append(picture)
        return made[0], made[1], made[2]

    def through(self, network: vae.AutoencoderKL) -> list[tuple[int, Pair]]:
        """Of some drawings: the number, and the views of pictures that went through the autoencoder."""
        rng, found = np.random.default_rng(5), []
        for start in range(0, DECODED, 16):
            numbers = [self.every[int(n)] for n in rng.integers(len(self.every), size=16)]
            made = [self.pictures_of(number, rng) for number in numbers]
            with mixed(network.device):
                decoded = vae.decoded(network, pictures.to_network([picture for trio in made for picture in trio[1:]]))
            decoded = (decoded.float().cpu() / 2 + 0.5).clamp(0, 1)
            for n, (number, (plain, _, _)) in enumerate(zip(numbers, made, strict=True)):
                found.append((number, (view_of(plain), view_of(decoded[2 * n]), view_of(decoded[2 * n + 1]))))
            if start % 160 == 0:
                note(f"encoder: {start} of {DECODED} through the autoencoder")
        return found

    def some(self, rng: np.random.Generator) -> list[Pair]:
        """Views of different drawings: a third with kin, a third through the autoencoder, the others any."""
        chosen: dict[int, Pair | None] = {}
        while len(chosen) < DRAWINGS // 3:
            family = self.families[int(rng.integers(len(self.families)))]
            chosen |= dict.fromkeys(int(n) for n in rng.choice(family, min(4, len(family)), replace=False))
        while len(chosen) < 2 * DRAWINGS // 3:
            number, pair = self.decoded[int(rng.integers(len(self.decoded)))]
            chosen[number] = pair
        while len(chosen) < DRAWINGS:
            chosen.setdefault(self.every[int(rng.integers(len(self.every)))], None)
        return [pair or self.views_of(number, rng) for number, pair in chosen.items()]

    def views_of(self, number: int, rng: np.random.Generator) -> Pair:
        """Fresh views of a drawing."""
        plain, right, wrong = self.pictures_of(number, rng)
        return view_of(plain), view_of(varied(right, rng)), view_of(varied(wrong, rng))


def loss_of(model: nn.Module, scale: Scale, pairs: Sequence[Pair]) -> Tensor:
    """Cross-entropy of the right pictures' drawings, and of none for the spoilt ones."""
    batch = torch.stack([view for which in range(3) for view in (pair[which] for pair in pairs)])
    batch = batch.to(scale.threshold.device).contiguous(memory_format=torch.channels_last)
    with mixed(scale.threshold.device):
        drawn, right, wrong = model(batch * 2 - 1).logits.float().chunk(3)
    own = torch.arange(len(pairs), device=drawn.device)
    none = torch.full_like(own, len(pairs))
    return F.cross_entropy(scale(right, drawn), own) + F.cross_entropy(scale(wrong, drawn), none)


def train() -> None:
    """Train to the end, from the last checkpoint; leaves the model folder in `models`."""
    torch.manual_seed(0)
    device = pick_device()
    model, scale = build().to(device, memory_format=torch.channels_last), Scale().to(device)
    run = Run("encoder", {"model": model, "scale": scale}, STEPS, SCHEDULE, weight_decay=0.02)
    model.train()
    painter = Painter(vae.load().to(device))
    run.fit(lambda rng: loss_of(model, scale, painter.some(rng)))
    model.config.cosine_scale = round(float(scale.log_scale.exp()), 4)
    model.config.cosine_of_none = round(1 - math.log(CERTAINTY / (1 - CERTAINTY)) / model.config.cosine_scale, 4)
    save_half(model, FOLDER)
    subjects.save_decoded(vae.load())
    note(
        f"encoder: scale {model.config.cosine_scale}, none {model.config.cosine_of_none}, learned {scale.threshold:.4f}"
    )
