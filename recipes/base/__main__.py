"""`python -m recipes.base [stage ...]`: all stages in order, or those named; goes on where it was killed."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from PIL import Image

from diffusekrona.generation import generate_images
from research.judges.classifier import Judge

from . import art, classifier, export, judge, subjects, unet, vae
from .training import load_checkpoint, note, pick_device

RESULTS = art.HERE / "results.json"
SHEET = art.HERE / "contact-sheet.png"


def make_art() -> None:
    """Fetch the drawings and write the pictures to personalise on."""
    art.fetch()
    subjects.draw_all()
    note(f"art done: {len(art.concepts())} concepts, {len(art.every_image())} drawings in two styles")


def folder_mb(folder: Path) -> float:
    """Size of a folder's files in megabytes."""
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 2)


def spent(name: str) -> dict[str, float]:
    """Steps and minutes of a training stage, from its checkpoint."""
    state = load_checkpoint(art.CACHE / f"{name}.pt")
    if state is None:
        raise FileNotFoundError(f"run the {name} stage first")
    return {"steps": int(state["budget"]["step"]), "minutes": round(float(state["budget"]["minutes"]), 1)}


def make_judgement() -> None:
    """Judge the exported pipeline on plain prompts and on scenes; write `results.json` and the contact sheet."""
    pipe, classified = export.load(), Judge(classifier.FOLDER)
    asked = {"obedience": judge.plain_questions(300), "scenes": judge.scene_questions(300)}
    drawn = {name: draw(pipe, questions) for name, questions in asked.items()}
    parts = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2", "vae")}
    report: dict[str, Any] = {
        "concepts": len(art.concepts()),
        "backgrounds": len(art.COLOURS),
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "megabytes": {path.name: folder_mb(path) for path in (export.FOLDER, classifier.FOLDER)},
        "device": pick_device().type,
        "vae": spent("vae") | {"l1": round(vae.reconstruction_error(vae.load()), 4)},
        "unet_and_text": spent("unet"),
        "classifier": spent("classifier") | classifier.accuracy(),
        "drawn_with": {"steps": judge.STEPS, "guidance": judge.GUIDANCE},
    }
    for name, questions in asked.items():
        report[name] = {"prompts": len(questions)} | judge.obedience(classified, drawn[name], questions)
        note(f"{name}: {report[name]}")
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    shown = [*zip(drawn["obedience"][:24], judge.prompts(asked["obedience"][:24]), strict=True)]
    shown += zip(drawn["scenes"][:24], judge.prompts(asked["scenes"][:24]), strict=True)
    judge.contact_sheet(shown, SHEET)


def draw(pipe: StableDiffusionXLPipeline, asked: Sequence[judge.Question]) -> list[Image.Image]:
    """The model's answers."""
    return generate_images(
        pipe,
        judge.prompts(asked),
        range(len(asked)),
        guidance_scale=judge.GUIDANCE,
        steps=judge.STEPS,
        batch_size=50,
    )


STAGES: dict[str, Callable[[], None]] = {
    "art": make_art,
    "vae": vae.train,
    "classifier": classifier.train,
    "unet": unet.train,
    "export": export.export,
    "judge": make_judgement,
}


def main() -> None:
    """Run the stages asked for, in their order."""
    parser = argparse.ArgumentParser(prog="python -m recipes.base", description=__doc__)
    listed = ", ".join(STAGES)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"any of: {listed} (default: all)")
    named = parser.parse_args().stages
    if unknown := set(named) - set(STAGES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    for name, stage in STAGES.items():
        if not named or name in named:
            stage()


if __name__ == "__main__":
    main()
