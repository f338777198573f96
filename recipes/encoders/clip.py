"""A small CLIP: pictures of scenes and their captions in one space (contrastive, as Radford et al., 2021)."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from recipes.base.art import COLOURS, PIXELS, ROOT, Renderer, to_tensor
from recipes.base.captions import vocabulary_text
from recipes.base.scenes import EDGES, Scene, draw, random_scene
from recipes.base.text import build_tokenizer
from recipes.base.training import Budget, fit, load_checkpoint, mixed, note, pick_device, save_checkpoint

from .drawings import ALL_STYLES, Thing, held_out, things
from .folder import CACHE, image_settings, write_model

BATCH = 128
STEPS = 2000
MINUTES = 400.0
SCHEDULE = (1e-3, 0.02, 100)
WIDTH = 128
LENGTH = 32
CLASS_WORD_SHARE = 0.25
SCENES = 4  # of each thing in a batch: what tells these apart is size, place, number and background
FLUENT = ALL_STYLES.index("fluent")
FOLDER = ROOT / "models" / "emoji-clip"
CHECKPOINT = CACHE / "clip.pt"


def tokenizer() -> CLIPTokenizer:
    """Over the words of all captions."""
    names = sorted(thing.name for thing in things())
    return build_tokenizer([*names, *vocabulary_text([])], LENGTH)


def build(words: CLIPTokenizer) -> CLIPModel:
    """Patches of 8 pixels; four layers for pictures, three for captions, 128 wide."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "hidden_act": "gelu"}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = CLIPConfig(
        text_config={
            **shared, **ends, "num_hidden_layers": 3, "vocab_size": len(words), "max_position_embeddings": LENGTH,
        },
        vision_config={**shared, "num_hidden_layers": 4, "image_size": PIXELS, "patch_size": 8},
        projection_dim=WIDTH,
    )  # fmt: skip
    return CLIPModel(config)


@dataclass
class Scenes:
    """Draws captioned scenes; `numbers` and `styles` say of which things in which styles."""

    things: list[Thing]
    renderer: Renderer
    rng: np.random.Generator

    def one(self, number: int, style: int) -> tuple[torch.Tensor, str]:
        """A picture (1, 3, 64, 64) and its caption."""
        thing, scene = self.things[number], random_scene(self.rng)
        words = thing.kind if thing.kind and self.rng.random() < CLASS_WORD_SHARE else thing.name
        return to_tensor([draw(self.renderer, number, style, scene, self.rng)]), scene.caption(words)

    def batch(self, pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, list[str]]:
        """Pictures and captions of things in styles."""
        pictures, captions = zip(*(self.one(number, style) for number, style in pairs), strict=True)
        return torch.cat(pictures), list(captions)


def varied(pictures: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Colours, sharpness and grain varied, so that a generated picture's flaws count for little."""
    count = len(pictures)
    tint = 0.94 + 0.12 * torch.rand(count, 3, 1, 1, generator=draw)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(count, 1, 1, 1, generator=draw)
    grain = 0.03 * torch.randn(pictures.shape, generator=draw)
    return ((pictures + share * (blurred - pictures)) * tint + grain).clamp(-1, 1)


def train() -> None:
    """Train to the budget, going on from the last checkpoint; leaves the model folder in `models`."""
    device, words, known = pick_device(), tokenizer(), things()
    torch.manual_seed(0)
    model = build(words).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SCHEDULE[0], weight_decay=0.1, betas=(0.9, 0.98))
    budget = Budget(STEPS, MINUTES)
    if state := load_checkpoint(CHECKPOINT):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        budget.restore(state["budget"])
    unseen = held_out(known)
    pairs = [
        (number, style)
        for number in range(len(known))
        for style in range(len(ALL_STYLES))
        if style != FLUENT or number not in unseen
    ]
    rng = np.random.default_rng(budget.step)
    scenes = Scenes(known, Renderer([thing.image for thing in known], ALL_STYLES, EDGES), rng)
    random = torch.Generator().manual_seed(budget.step)

    def one_step() -> torch.Tensor:
        chosen = [pairs[int(i)] for i in rng.choice(len(pairs), BATCH // SCENES, replace=False) for _ in range(SCENES)]
        pictures, captions = scenes.batch(chosen)
        text = words(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        with mixed(device):
            answer = model(
                input_ids=text.input_ids.to(device),
                attention_mask=text.attention_mask.to(device),
                pixel_values=varied(pictures, random).to(device),
            )
        logits, truth = answer.logits_per_image.float(), torch.arange(BATCH, device=device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    def checkpoint() -> None:
        weights, optim = model.state_dict(), optimizer.state_dict()
        save_checkpoint(CHECKPOINT, {"model": weights, "optimizer": optim, "budget": budget.state()})

    fit("clip", budget, optimizer, one_step, checkpoint, SCHEDULE)
    write_model(model, FOLDER, CLIPImageProcessor(**image_settings()), words)
    note(f"clip done: {budget.step} steps, {budget.elapsed():.1f} min")


@torch.no_grad()
def judge() -> dict[str, float]:
    """Retrieval among held-out drawings: the right name for a picture, and the right scene for one thing."""
    model, words = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(FOLDER)
    known = things()
    unseen = sorted(held_out(known))
    shown = [known[number] for number in unseen]
    scenes = Scenes(known, Renderer([t.image for t in shown], ("fluent",), EDGES), np.random.default_rng(3))

    def embedded(captions: list[str]) -> torch.Tensor:
        text = words(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        return F.normalize(model.get_text_features(**text).pooler_output, dim=-1)

    def seen(pictures: torch.Tensor) -> torch.Tensor:
        return F.normalize(model.get_image_features(pixel_values=pictures).pooler_output, dim=-1)

    plain = [Scene(str(colour)) for colour in scenes.rng.choice(list(COLOURS), len(shown))]
    pictures = to_tensor([draw(scenes.renderer, i, 0, scene, scenes.rng) for i, scene in enumerate(plain)])
    captions = [scene.caption(thing.name) for scene, thing in zip(plain, shown, strict=True)]
    likeness = seen(pictures) @ embedded(captions).T
    right = torch.arange(len(shown))
    among = likeness.topk(5).indices
    found = {
        "drawings": len(shown),
        "picture_to_caption_top1": float((likeness.argmax(1) == right).float().mean()),
        "picture_to_caption_top5": float((among == right[:, None]).any(1).float().mean()),
        "caption_to_picture_top1": float((likeness.argmax(0) == right).float().mean()),
    }
    kinds: dict[str, list[Scene]] = {
        "background": [Scene(colour) for colour in COLOURS],
        "place": [Scene("blue", place=place) for place in ("left", "right", "top", "bottom")],
        "size": [Scene("green", size=size) for size in ("small", "large")],
        "times": [Scene("yellow", times=times) for times in (1, 2, 3)],
    }
    for kind, options in kinds.items():
        hits = []
        for index, thing in enumerate(shown):
            pictures = to_tensor([draw(scenes.renderer, index, 0, scene, scenes.rng) for scene in options])
            answers = (seen(pictures) @ embedded([scene.caption(thing.name) for scene in options]).T).argmax(1)
            hits += (answers == torch.arange(len(options))).tolist()
        found[f"{kind}_of_{len(options)}"] = sum(hits) / len(hits)
    return {name: round(value, 4) for name, value in found.items()}
