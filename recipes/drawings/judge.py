"""Does the base draw what it is asked for? Plain prompts, scenes and held-out styles, judged; and the contact sheet."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from . import art, classifier, export, pictures
from .art import HERE, PIXELS, STYLES
from .pictures import COLOURS
from .scenes import Scene, one_of, random_scene
from .seen import obeyed, shares
from .training import mixed, note

STEPS = 20
GUIDANCE = 3.0
BATCH = 25
RESULTS = HERE / "results.json"
SHEET = HERE / "contact-sheet.png"
Question = tuple[int, str]
"""Number of the concept, and the prompt."""


def plain_questions(count: int, seed: int = 11) -> list[Question]:
    """Random concepts (none twice while they last) in random styles on random backgrounds."""
    rng, known = np.random.default_rng(seed), art.known_drawings()
    order = np.concatenate([rng.permutation(len(known)) for _ in range(-(-count // len(known)))])[:count]
    return [question(*known[int(n)][:2], Scene(one_of(rng, list(COLOURS)))) for n in order]


def scene_questions(count: int, seed: int = 13) -> list[Question]:
    """Questions about random concepts that also name a size, a place or a number."""
    rng, known, asked = np.random.default_rng(seed), art.known_drawings(), list[Question]()
    while len(asked) < count:
        scene = random_scene(rng)
        if scene.size or scene.place or scene.times > 1:
            asked.append(question(*one_of(rng, known)[:2], scene))
    return asked


def hidden_questions(each: int = 12, seed: int = 17) -> list[Question]:
    """The subjects' classes in the style whose drawing of them was held out."""
    rng, names = np.random.default_rng(seed), [concept.name for concept in art.concepts()]
    kin = [subject for subject in art.subjects() if subject.kin]
    return [
        question(names.index(subject.word), STYLES[subject.set], Scene(one_of(rng, list(COLOURS))))
        for subject in kin
        for _ in range(each)
    ]


def question(number: int, style: str, scene: Scene) -> Question:
    """One question."""
    return number, scene.caption(f"{style} {art.concepts()[number].name}")


@torch.no_grad()
def draw(pipe: StableDiffusionXLPipeline, asked: Sequence[Question]) -> list[Tensor]:
    """The model's answers, (3, 128, 128) in [0, 1]; question n's noise has seed n."""
    pipe.set_progress_bar_config(disable=True)
    drawn: list[Tensor] = []
    for start in range(0, len(asked), BATCH):
        prompts = [words for _, words in asked[start : start + BATCH]]
        seeds = [torch.Generator().manual_seed(start + n) for n in range(len(prompts))]
        with mixed(pipe.unet.device):
            images = pipe(
                prompts, generator=seeds, guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="pt"
            ).images
        drawn += list(images.float().cpu())
    return drawn


def judge() -> None:
    """Judge the exported pipeline; write `results.json` and the contact sheet."""
    pipe, named = export.load(), classifier.load()
    asked = {"plain": plain_questions(300), "scenes": scene_questions(300), "held_out": hidden_questions()}
    parts = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2", "vae")}
    report: dict[str, Any] = {
        "concepts": len(art.concepts()),
        "drawings": len(art.known_drawings()),
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "classifier": classifier.accuracy(),
        "drawn_with": {"steps": STEPS, "guidance": GUIDANCE},
    }
    shown: list[tuple[Tensor, str]] = []
    for name, questions in asked.items():
        drawn = draw(pipe, questions)
        best = classifier.concepts_in(named, drawn)
        first = [number == found[0] for (number, _), found in zip(questions, best, strict=True)]
        five = [number in found for (number, _), found in zip(questions, best, strict=True)]
        answers = [obeyed(picture, words) for picture, (_, words) in zip(drawn, questions, strict=True)]
        right = {"concept_first": round(float(np.mean(first)), 4), "concept_in_five": round(float(np.mean(five)), 4)}
        report[name] = {"prompts": len(questions)} | right | shares(answers)
        note(f"{name}: {report[name]}")
        every = max(1, len(questions) // 32)
        shown += [(picture, words) for picture, (_, words) in zip(drawn, questions, strict=True)][::every][:32]
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    contact_sheet(shown, SHEET)


def contact_sheet(shown: Sequence[tuple[Tensor, str]], path: Path, columns: int = 8) -> None:
    """Save pictures, each over its prompt."""
    width, height = PIXELS + 12, PIXELS + 34
    sheet = Image.new("RGB", (columns * width, -(-len(shown) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, words) in enumerate(shown):
        left, top = number % columns * width + 6, number // columns * height + 6
        sheet.paste(pictures.to_image(picture), (left, top))
        thing, _, ground = words.partition(" on ")
        pen.text((left, top + PIXELS + 2), f"{thing}\non {ground}" if ground else thing, "black", font_size=9)
    sheet.save(path, optimize=True)
