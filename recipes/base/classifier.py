"""The judge's classifier: which concept on which background. It sees renders only, never the generator."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from diffusekrona.evaluation.judge import Judge

from .art import CACHE, COLOURS, PIXELS, ROOT, STYLES, Renderer, background, concepts, sprite, to_image
from .judge import obedience
from .training import Budget, fit, load_checkpoint, mixed, note, pick_device, save_checkpoint

BATCH = 96
STEPS = 4000
MINUTES = 3.5
SCHEDULE = (3e-3, 0.0, 100)
BANK_PIXELS = 48
FOLDER = ROOT / "models" / "emoji-classifier"
CHECKPOINT = CACHE / "classifier.pt"


def labels() -> list[str]:
    """Names of the logits: the concepts, then the background colours."""
    return [f"concept:{c.name}" for c in concepts()] + [f"background:{name}" for name in COLOURS]


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


class Augmenter:
    """Draws batches with place, size, rotation, mirroring, colours and sharpness all varied."""

    def __init__(self, device: torch.device, seed: int) -> None:
        bank = [np.stack([sprite(s, c.image, BANK_PIXELS) for s in STYLES]) for c in concepts()]
        self.bank = torch.from_numpy(np.stack(bank)).to(device)  # (concepts, styles, 4, 48, 48)
        self.draw = torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.device = device

    def between(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """Uniform random numbers."""
        return low + (high - low) * torch.rand(shape, generator=self.draw)

    def placed(self, drawings: torch.Tensor) -> torch.Tensor:
        """Turn, mirror, resize and move premultiplied drawings on an empty (n, 4, 64, 64) canvas."""
        count = len(drawings)
        size = self.between(30, 58, count) / PIXELS  # share of the canvas
        turn = self.between(-0.3, 0.3, count)  # radians
        mirror = torch.where(torch.rand(count, generator=self.draw) < 0.5, -1.0, 1.0)
        shift = self.between(-1, 1, count, 2) * (1 - size)[:, None]
        rows = torch.stack([turn.cos() * mirror, -turn.sin() * mirror, turn.sin(), turn.cos()], -1)
        matrix = rows.view(count, 2, 2) / size[:, None, None]
        offset = -(matrix @ shift[..., None])
        theta = torch.cat([matrix, offset], -1).to(self.device)
        grid = F.affine_grid(theta, [count, 4, PIXELS, PIXELS], align_corners=False)
        return F.grid_sample(drawings, grid, align_corners=False)

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures (n, 3, 64, 64) in [-1, 1], concept numbers (n), background numbers (n)."""
        concept = torch.randint(len(self.bank), (count,), generator=self.draw)
        style = torch.randint(len(STYLES), (count,), generator=self.draw)
        colour = torch.randint(len(COLOURS), (count,), generator=self.draw)
        names = list(COLOURS)
        flat = np.stack([background(names[int(i)], self.rng, jitter=14) for i in colour])
        drawn = self.placed(self.bank[concept.to(self.device), style.to(self.device)])
        alpha = drawn[:, 3:]
        tint = self.between(0.88, 1.12, count, 3, 1, 1) * self.between(0.85, 1.15, count, 1, 1, 1)
        ink = torch.minimum(drawn[:, :3] * tint.to(self.device), alpha)
        picture = ink + (1 - alpha) * torch.from_numpy(flat).to(self.device)[:, :, None, None]
        grain = 0.02 * torch.randn(picture.shape, generator=self.draw).to(self.device)
        picture = self.softened(picture) + grain
        picture = (picture.clamp(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)
        return picture, concept.to(self.device), colour.to(self.device)

    def softened(self, picture: torch.Tensor) -> torch.Tensor:
        """Blend each picture with a blurred copy of itself, by a random share."""
        blurred = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        share = self.between(0, 1, len(picture), 1, 1, 1).to(self.device)
        return picture + share * (blurred - picture)


def train() -> None:
    """Train to the budget, continuing from the last checkpoint; leaves the model folder in `models`."""
    device = pick_device()
    torch.manual_seed(0)
    model = build().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SCHEDULE[0], weight_decay=0.02)
    budget = Budget(STEPS, MINUTES)
    if state := load_checkpoint(CHECKPOINT):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        budget.restore(state["budget"])
    augmenter, things = Augmenter(device, seed=budget.step), len(concepts())

    def one_step() -> torch.Tensor:
        pictures, concept, colour = augmenter.batch(BATCH)
        with mixed(device):
            logits = model(pictures).logits.float()
        return F.cross_entropy(logits[:, :things], concept) + F.cross_entropy(logits[:, things:], colour)

    def checkpoint() -> None:
        weights, optim = model.state_dict(), optimizer.state_dict()
        save_checkpoint(CHECKPOINT, {"model": weights, "optimizer": optim, "budget": budget.state()})

    model.train()
    fit("classifier", budget, optimizer, one_step, checkpoint, SCHEDULE)
    model.to(torch.float16).save_pretrained(FOLDER)
    note(f"classifier done: {budget.step} steps, {budget.elapsed():.1f} min, {accuracy()}")


def accuracy() -> dict[str, float]:
    """Share right on plain renders at sizes and places not trained on: two of each concept in each style."""
    renderer = Renderer([c.image for c in concepts()], sizes=(35, 42, 51))
    rng, names = np.random.default_rng(7), list(COLOURS)
    pictures, truth = [], []
    for index in range(len(renderer.images)):
        for style in (0, 0, 1, 1):
            colour = int(rng.integers(len(names)))
            pictures.append(to_image(renderer.draw(index, style, background(names[colour], rng), rng)))
            truth.append((index, colour))
    return {"renders": len(truth)} | obedience(Judge(FOLDER), pictures, truth)
