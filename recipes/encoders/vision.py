"""A small self-supervised vision transformer: two pictures of one drawing are alike, of different ones are not.

Trained as Chen et al., 2020 (SimCLR): cross-entropy of the right pair among all pictures of a batch. The two pictures
differ in background, size, place, tint and sharpness, so the class token comes to tell drawings apart and little else.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from recipes.base.art import COLOURS, PIXELS, ROOT
from recipes.base.augmenting import Augmenter, bank_of
from recipes.base.subjects import SUBJECTS
from recipes.base.training import Budget, fit, load_checkpoint, mixed, note, pick_device, save_checkpoint

from .drawings import ALL_STYLES, held_out, things
from .folder import CACHE, image_settings, write_model

BATCH = 96
STEPS = 2000
MINUTES = 400.0
SCHEDULE = (1e-3, 0.02, 100)
WIDTH = 96
TEMPERATURE = 0.1
EDGES = (24.0, 60.0)
FOLDER = ROOT / "models" / "emoji-vit"
CHECKPOINT = CACHE / "vision.pt"


def build() -> tuple[ViTModel, nn.Module]:
    """The transformer, and the projection that only training uses."""
    config = ViTConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4, num_attention_heads=3, image_size=PIXELS,
        patch_size=8,
    )  # fmt: skip
    head = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH // 2))
    return ViTModel(config, add_pooling_layer=False), head


def drawings() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(style, image) pairs to train on, and pairs of emoji that are in no style among those."""
    known = things()
    unseen = held_out(known)
    train = [(style, thing.image) for n, thing in enumerate(known) if n not in unseen for style in ALL_STYLES]
    return train, [("fluent", known[number].image) for number in sorted(unseen)]


def loss_of(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Each picture finds the other picture of its drawing among all the others of the batch."""
    count = len(one)
    every = F.normalize(torch.cat([one, two]).float(), dim=-1)
    likeness = every @ every.T / TEMPERATURE
    likeness.fill_diagonal_(-torch.inf)
    return F.cross_entropy(likeness, torch.arange(2 * count, device=one.device).roll(count))


def train() -> None:
    """Train to the budget, going on from the last checkpoint; leaves the model folder in `models`."""
    device, pairs = pick_device(), drawings()[0]
    torch.manual_seed(0)
    model, head = (part.to(device).train() for part in build())
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=SCHEDULE[0], weight_decay=0.05, betas=(0.9, 0.98))
    budget = Budget(STEPS, MINUTES)
    if state := load_checkpoint(CHECKPOINT):
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        budget.restore(state["budget"])
    augmenter = Augmenter(bank_of(pairs), device, budget.step, EDGES)

    def one_step() -> torch.Tensor:
        drawing = augmenter.choose(len(pairs), BATCH)
        views = [augmenter.draw(drawing, augmenter.choose(len(COLOURS), BATCH)) for _ in range(2)]
        with mixed(device):
            marks = head(model(pixel_values=torch.cat(views)).last_hidden_state[:, 0])
        return loss_of(*marks.chunk(2))

    def checkpoint() -> None:
        state = {"model": model.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(CHECKPOINT, state | {"budget": budget.state()})

    fit("vision", budget, optimizer, one_step, checkpoint, SCHEDULE)
    write_model(model, FOLDER, ViTImageProcessor(**image_settings()))
    note(f"vision done: {budget.step} steps, {budget.elapsed():.1f} min")


@torch.no_grad()
def judge() -> dict[str, float]:
    """Does a picture find the other picture of its drawing, among emoji that training never showed?"""
    model = ViTModel.from_pretrained(FOLDER, dtype=torch.float32, add_pooling_layer=False).eval()
    unseen = drawings()[1] + [("fluent", subject.image) for subject in SUBJECTS]
    augmenter = Augmenter(bank_of(unseen), torch.device("cpu"), seed=99, edges=EDGES)
    everything = torch.arange(len(unseen))
    marks = []
    for _ in range(2):
        pictures = augmenter.draw(everything, augmenter.choose(len(COLOURS), len(unseen)))
        marks.append(F.normalize(model(pixel_values=pictures).last_hidden_state[:, 0], dim=-1))
    likeness = marks[0] @ marks[1].T
    among = likeness.topk(5).indices
    return {
        "drawings": len(unseen),
        "same_drawing_top1": round(float((likeness.argmax(1) == everything).float().mean()), 4),
        "same_drawing_top5": round(float((among == everything[:, None]).any(1).float().mean()), 4),
    }
