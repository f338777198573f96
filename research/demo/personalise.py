"""Personalise the repository's small base model on a few pictures, then save, reload, merge, generate and measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusekrona.bases.loading import load_base
from diffusekrona.errors import KronAError
from diffusekrona.generation import generate_images
from diffusekrona.kron.exact import Restoration
from diffusekrona.pipeline import load_krona, merge_krona, save_krona, unmerge_krona
from diffusekrona.report import krona_report
from diffusekrona.training import TrainingConfig, TrainingStep, train_dreambooth
from diffusekrona.tuner.config import KronAConfig
from diffusekrona.tuner.injected import krona_layers

from ..judges.classifier import Judge
from .picture import draw_picture
from .result import DemoResult, write_markdown

SUBJECT = "a sks toy"
BACKGROUNDS = ("orange", "purple", "pink", "brown", "black", "gray")  # none of them in the subject's pictures
SEEDS = (0, 1)
# All linear layers of the transformer blocks: on this small base, attention alone blurs the face and the backgrounds.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
KRONA = KronAConfig(a1=2, a2=4, target_modules=TARGETS)
TRAINING = TrainingConfig(
    max_train_steps=1100, train_batch_size=8, learning_rate=3e-3, lr_scheduler="cosine", mixed_precision="bf16"
)
GUIDANCE = 1.5  # at the base's 3 a subject learnt from five pictures comes out overdrawn


@dataclass(frozen=True)
class DemoPaths:
    """Where the demo finds what it needs, and where it writes.

    Attributes:
        base: a pipeline folder.
        judge: the classifier's folder.
        subject: a folder of pictures with a caption file beside each.
        output: made if missing.
    """

    base: Path = Path("models/emoji-sdxl")
    judge: Path = Path("models/emoji-classifier")
    subject: Path = Path("examples/toy-bear")
    output: Path = Path("demo-output")

    def check(self) -> None:
        """Raise `KronAError` naming the first folder that is not there."""
        for what, path in (
            ("base model", self.base),
            ("classifier", self.judge),
            ("subject's pictures", self.subject),
        ):
            if not path.is_dir():
                raise KronAError(
                    f"The {what} should be in {path}, which is no folder. Run the demo in a clone of the repository, "
                    "or say where the folder is."
                )


def run_demo(
    paths: DemoPaths,
    *,
    krona: KronAConfig = KRONA,
    training: TrainingConfig = TRAINING,
    generation_steps: int = 30,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_step: Callable[[TrainingStep], None] | None = None,
) -> DemoResult:
    """Run the demo; its adapter, picture and pictures are left in `paths.output`.

    Raises:
        KronAError: something is missing, or merged and unmerged pictures differ by more than rounding.
    """
    paths.check()
    began = time.monotonic()
    paths.output.mkdir(parents=True, exist_ok=True)
    judge = Judge(paths.judge)
    subject = [Image.open(path).convert("RGB") for path in sorted(paths.subject.glob("*.png"))]

    pipe = _fresh_pipeline(paths.base)
    on_stage("the base model answers")
    before = _generate(pipe, generation_steps)
    on_stage("training")
    trained = train_dreambooth(pipe, paths.subject, SUBJECT, training, krona, on_step=on_step)
    report = krona_report(pipe)
    file = save_krona(pipe, paths.output / "toy-bear.safetensors")

    on_stage("a fresh pipeline loads the adapter")
    pipe = _fresh_pipeline(paths.base)
    load_krona(pipe, file)
    unmerged = _generate(pipe, generation_steps)
    on_stage("merging")
    bits = _bits(pipe.unet)
    merge_krona(pipe)
    after = _generate(pipe, generation_steps)
    entries = _stored_entries(pipe.unet)
    unmerge_krona(pipe)

    on_stage("drawing")
    picture = draw_picture(paths.output / "demo.png", subject, before, after, BACKGROUNDS)
    result = DemoResult(
        parameters=report.parameters,
        share=report.share,
        file_bytes=file.stat().st_size,
        training_seconds=trained.seconds,
        seconds=time.monotonic() - began,
        similarity_base=judge.similarity(before, subject),
        similarity_krona=judge.similarity(after, subject),
        similarity_ceiling=judge.similarity(subject, subject),
        background_base=_background_accuracy(judge, before),
        background_krona=_background_accuracy(judge, after),
        merged_difference=_largest_difference(unmerged, after),
        unmerge_exact=_bits(pipe.unet) == bits,
        stored_entries=entries,
        picture=picture,
    )
    write_markdown(result, paths.output / "demo.md")
    return result


def _fresh_pipeline(base: Path) -> Any:
    pipe = load_base(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _prompts() -> list[str]:
    article = {name: "an" if name[0] in "aeiou" else "a" for name in BACKGROUNDS}
    return [f"{SUBJECT} on {article[name]} {name} background" for name in BACKGROUNDS]


def _generate(pipe: Any, steps: int) -> list[Image.Image]:
    """All backgrounds with the first seed, then all with the next."""
    prompts = _prompts() * len(SEEDS)
    seeds = [seed for seed in SEEDS for _ in BACKGROUNDS]
    return generate_images(pipe, prompts, seeds, guidance_scale=GUIDANCE, steps=steps, batch_size=len(BACKGROUNDS))


def _background_accuracy(judge: Judge, images: Sequence[Image.Image]) -> float:
    asked = list(BACKGROUNDS) * len(SEEDS)
    named = judge.name_backgrounds(images)
    return sum(a == b for a, b in zip(asked, named, strict=True)) / len(asked)


def _largest_difference(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> int:
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)


def _bits(unet: torch.nn.Module) -> list[bytes]:
    return [layer.weight.detach().numpy().tobytes() for layer in krona_layers(unet).values()]


def _stored_entries(unet: torch.nn.Module) -> float:
    layers = list(krona_layers(unet).values())
    stored = sum(layer.restoration.entries for layer in layers if isinstance(layer.restoration, Restoration))
    return stored / sum(layer.weight.numel() for layer in layers)
