"""The judge's classifier: which concept on which background. It sees renders only, never the generator.

It looks at 64 x 64 pixels: pictures of the base are halved first.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from . import art, pictures, scenes
from .art import ROOT
from .pictures import COLOURS
from .training import Run, mixed, note, pick_device

BATCH = 96
STEPS = 4_000
SCHEDULE = (3e-3, 0.0, 100)
FOLDER = ROOT / "models" / "drawings-classifier"
PLAIN_SHARE = 0.3  # of the pictures; the others' colours and sharpness vary
EDGES = (44, 124)


def labels() -> list[str]:
    """Names of the logits: the concepts, then the background colours."""
    return [f"concept:{concept.name}" for concept in art.concepts()] + [f"background:{name}" for name in COLOURS]


def build() -> ResNetForImageClassification:
    """A small basic-block ResNet over 64 x 64 pictures in [-1, 1]."""
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels())),
        label2id={name: number for number, name in enumerate(labels())},
    )
    return ResNetForImageClassification(config)


def varied(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """A picture in [0, 1] with its colours, sharpness and grain a little changed."""
    if rng.random() < PLAIN_SHARE:
        return picture
    tint = torch.from_numpy(rng.uniform(0.9, 1.1, (3, 1, 1)).astype(np.float32))
    blurred = F.avg_pool2d(F.pad(picture[None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
    soft = picture + float(rng.random()) * (blurred - picture)
    return (soft * tint + 0.02 * torch.randn(picture.shape)).clamp(0, 1)


def one(drawing: int, colour: int, rng: np.random.Generator) -> Tensor:
    """A drawing of the bank, often mirrored, on a colour by number: (3, 64, 64) in [0, 1]."""
    edge = int(rng.integers(EDGES[0], EDGES[1] + 1))
    top, left = (int(offset) for offset in rng.integers(0, art.PIXELS - edge + 1, 2))
    picture = pictures.flat(pictures.named(list(COLOURS)[colour], rng, jitter=12))
    pictures.paste(picture, pictures.resized(drawing, edge), top, left)
    picture = picture.flip(-1) if rng.random() < 0.3 else picture
    return varied(F.avg_pool2d(picture, 2), rng)


def train() -> None:
    """Train to the end, from the last checkpoint; leaves the model folder in `models`."""
    device = pick_device()
    torch.manual_seed(0)
    model = build().to(device, memory_format=torch.channels_last)
    run = Run("classifier", {"model": model}, STEPS, SCHEDULE, weight_decay=0.02)
    known, things = art.known_drawings(), len(art.concepts())
    numbers = [art.places()[drawing] for _, _, drawing in known]

    def loss_at(rng: np.random.Generator) -> Tensor:
        drawn, colour = rng.integers(len(known), size=BATCH), rng.integers(len(COLOURS), size=BATCH)
        batch = [one(numbers[d], int(c), rng) for d, c in zip(drawn, colour, strict=True)]
        concept = torch.tensor([known[d][0] for d in drawn], device=device)
        with mixed(device):
            logits = model(pictures.to_network(batch).to(device)).logits.float()
        ground = torch.from_numpy(colour).to(device)
        return F.cross_entropy(logits[:, :things], concept) + F.cross_entropy(logits[:, things:], ground)

    model.train()
    run.fit(loss_at)
    model.to(torch.float16).save_pretrained(FOLDER)
    note(f"classifier: {accuracy()}")


def load() -> ResNetForImageClassification:
    """The trained classifier, in evaluation mode."""
    model: ResNetForImageClassification = ResNetForImageClassification.from_pretrained(FOLDER, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def concepts_in(model: ResNetForImageClassification, drawn: Sequence[Tensor], best: int = 5) -> list[list[int]]:
    """For each picture, (3, 128, 128) in [0, 1], the likeliest concepts by number, likeliest first."""
    small = [F.avg_pool2d(picture, 2) for picture in drawn]
    logits = torch.cat([model(pictures.to_network(small[n : n + 64])).logits for n in range(0, len(small), 64)])
    ranked: list[list[int]] = logits[:, : len(art.concepts())].topk(best).indices.tolist()
    return ranked


def accuracy() -> dict[str, float]:
    """Share of concepts named right on plain renders: every known drawing, and the subjects that have kin."""
    rng, model, names = np.random.default_rng(7), load(), [concept.name for concept in art.concepts()]
    asked = {
        "known": [(number, drawing) for number, _, drawing in art.known_drawings()],
        "subjects": [(names.index(s.word), (s.set, s.drawing)) for s in art.subjects() if s.kin],
    }
    found = {}
    for group, pairs in asked.items():
        drawn = [
            scenes.draw(art.places()[drawing], scenes.Scene(scenes.one_of(rng, list(COLOURS))), rng)
            for _, drawing in pairs
        ]
        named = concepts_in(model, drawn)
        found[group] = round(float(np.mean([n == f[0] for (n, _), f in zip(pairs, named, strict=True)])), 4)
    return found
