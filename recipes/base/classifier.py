"""The judge's classifier: which concept on which background. It sees renders only, never the generator."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from research.judges.classifier import Judge

from .art import CACHE, COLOURS, ROOT, STYLES, Renderer, background, concepts, to_image
from .augmenting import Augmenter, bank_of
from .judge import named_right
from .training import Budget, fit, load_checkpoint, mixed, note, pick_device, save_checkpoint, save_half

BATCH = 96
STEPS = 4000
MINUTES = 3.5
SCHEDULE = (3e-3, 0.0, 100)
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
    things, drawings = len(concepts()), [(style, concept.image) for concept in concepts() for style in STYLES]
    augmenter = Augmenter(bank_of(drawings), device, seed=budget.step)

    def one_step() -> torch.Tensor:
        drawing, colour = augmenter.choose(len(drawings), BATCH), augmenter.choose(len(COLOURS), BATCH)
        pictures = augmenter.draw(drawing, colour)
        concept, colour = (drawing // len(STYLES)).to(device), colour.to(device)
        with mixed(device):
            logits = model(pictures).logits.float()
        return F.cross_entropy(logits[:, :things], concept) + F.cross_entropy(logits[:, things:], colour)

    def checkpoint() -> None:
        weights, optim = model.state_dict(), optimizer.state_dict()
        save_checkpoint(CHECKPOINT, {"model": weights, "optimizer": optim, "budget": budget.state()})

    model.train()
    fit("classifier", budget, optimizer, one_step, checkpoint, SCHEDULE)
    save_half(model, FOLDER)
    note(f"classifier done: {budget.step} steps, {budget.elapsed():.1f} min, {accuracy()}")


def accuracy() -> dict[str, float]:
    """Share right on plain renders at sizes and places not trained on: two of each concept in each style."""
    renderer = Renderer([c.image for c in concepts()], sizes=(35, 42, 51))
    rng, names = np.random.default_rng(7), list(COLOURS)
    pictures, things, grounds = [], [], []
    for index in range(len(renderer.images)):
        for style in (0, 0, 1, 1):
            ground = names[int(rng.integers(len(names)))]
            pictures.append(to_image(renderer.draw(index, style, background(ground, rng), rng)))
            things.append(index)
            grounds.append(ground)
    judge = Judge(FOLDER)
    right = [name == ground for name, ground in zip(judge.name_backgrounds(pictures), grounds, strict=True)]
    return {
        "renders": len(pictures),
        **named_right(judge, pictures, things),
        "background": round(float(np.mean(right)), 4),
    }
