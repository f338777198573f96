"""Trains a model, draws its pictures and scores them, one after another on the same base."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffusekrona.bases.loading import default_device, load_base
from diffusekrona.evaluation.encoders import Encoders
from diffusekrona.evaluation.metrics import drift, image_similarity, text_similarity
from diffusekrona.generation import generate_images
from diffusekrona.training import TrainingDivergedError, TrainingStep
from diffusekrona.training.data import ImagePlan, TrainingImage, load_folder
from diffusekrona.training.dreambooth import training_resolution
from diffusekrona.training.families import family_of
from diffusekrona.training.loop import fit
from diffusekrona.training.plan import SavedTensors
from diffusekrona.training.reports import ready_to_draw
from diffusekrona.training.runtime import seeded

from ..judges.scenes import obeyed, shares
from ..methods import Method, method_from
from .cells import BASE, Cell, View
from .records import Record
from .settings import StudySettings
from .sheets import sheet_of
from .spectrum import linear_weights, summary, updates

STATE = 12
"""Bytes of a gradient and of AdamW's two moments for each trained number."""

APART = 10_000
"""Distance between the seeds of pictures with the subject and of those without it."""


class Measurer:
    """One process's base and encoders.

    Args:
        settings: of all studies.

    Raises:
        KronAError: a model or a folder is missing.
    """

    def __init__(self, settings: StudySettings) -> None:
        self._settings, self._device = settings, default_device()
        self._pipe = load_base(settings.base, getattr(torch, settings.dtype))
        self._pipe.set_progress_bar_config(disable=True)
        self._encoders = Encoders(
            settings.clip, settings.dino, device=self._device, batch_size=settings.generation_batch_size
        )
        self._weights: dict[str, Tensor] = {}
        self._real: dict[str, tuple[Tensor, Tensor]] = {}
        self._of_base: dict[tuple[float | None, int | None], Tensor] = {}

    def measure(self, cells: Sequence[Cell]) -> list[Record]:
        """Train one model and look at it as each of the cells asks; all of them are of the same model.

        Raises:
            KronAError: the method does not suit the base.
        """
        for cell in cells:
            self._others_of_base(cell.view)
        if cells[0].spec.method == BASE:
            return [self._seen(cell, {}) for cell in cells]
        if any(cell.view.spectrum for cell in cells) and not self._weights:
            self._weights = linear_weights(family_of(self._pipe).denoiser)
        method = method_from(cells[0].spec.method, **cells[0].spec.options)
        with seeded(cells[0].seed, self._device):
            parameters = method.prepare(self._pipe)
        try:
            return self._trained(cells, method, parameters)
        finally:
            method.remove(self._pipe)

    def _trained(self, cells: Sequence[Cell], method: Method, parameters: Mapping[str, nn.Parameter]) -> list[Record]:
        spec, seed = cells[0].spec, cells[0].seed
        usual = self._settings.config(spec.training).max_train_steps
        by_step: dict[int, list[Cell]] = {}
        for cell in cells:
            by_step.setdefault(cell.view.step or usual, []).append(cell)
        config = self._settings.config({**spec.training, "max_train_steps": max(by_step), "seed": seed})
        images = self._real_images(cells[0].subject, spec.images)
        found: list[Record] = []
        trained = sum(p.numel() for p in parameters.values())
        costs: dict[str, Any] = {"parameters": trained}
        saved = SavedTensors(part for part in self._pipe.components.values() if isinstance(part, nn.Module))
        counting = ExitStack()
        looked = 0.0

        def look(done: TrainingStep) -> None:
            nonlocal looked
            began = time.monotonic()
            if done.step == 1:
                counting.close()
                costs["memory"] = saved.bytes + STATE * trained
                saved.clear()
            costs["seconds_per_step"] = (done.seconds - looked) / done.step
            if all(bool(parameter.isfinite().all()) for parameter in parameters.values()):
                for cell in by_step.get(done.step, []):
                    costs["bytes"] = self._saved_bytes(method)
                    found.append(self._seen(cell, {**costs, "loss": done.average}))
            looked += time.monotonic() - began

        try:
            with counting:
                counting.enter_context(saved.counting())
                fit(self._pipe, images, parameters, config, on_step=look)
        except TrainingDivergedError:
            seen = {record.cell.key for record in found}
            found += [Record(cell, {**costs, "diverged": True}) for cell in cells if cell.key not in seen]
        return found

    def _seen(self, cell: Cell, costs: Mapping[str, Any]) -> Record:
        """Pictures and scores of the pipeline as it is now."""
        settings, view = self._settings, cell.view
        name, kind = settings.name_of(cell.subject), settings.subjects[cell.subject].kind
        prompts = [prompt.format(name) for prompt in settings.prompts]
        drawn = self._draw(prompts, settings.image_seed, view)
        clip, dino = self._encoders.image_features(drawn)
        real_clip, real_dino = self._real_features(cell.subject)
        texts = self._encoders.text_features([prompt.format(kind) for prompt in settings.prompts])
        others = self._encoders.dino_features(self._draw(settings.other_prompts, settings.image_seed + APART, view))
        scores = {
            "clip_i": image_similarity(clip, real_clip),
            "clip_t": text_similarity(clip, texts),
            "dino": image_similarity(dino, real_dino),
            "drift": drift(others, self._others_of_base(view)),
        }
        found: dict[str, Any] = {**costs, **{what: score.mean for what, score in scores.items()}}
        if settings.scenes:
            found |= shares([obeyed(image, prompt) for image, prompt in zip(drawn, prompts, strict=True)])
        if view.spectrum:
            found["spectrum"] = summary(updates(family_of(self._pipe).denoiser, self._weights))
        return Record(cell, found, sheet_of(drawn))

    def _draw(self, prompts: Sequence[str], seed: int, view: View) -> list[Image.Image]:
        settings = self._settings
        with ready_to_draw(self._pipe, self._device):
            return generate_images(
                self._pipe,
                prompts,
                range(seed, seed + len(prompts)),
                guidance_scale=settings.guidance_scale if view.guidance_scale is None else view.guidance_scale,
                steps=view.inference_steps or settings.inference_steps,
                batch_size=settings.generation_batch_size,
            )

    def _others_of_base(self, view: View) -> Tensor:
        """DINO features of the base's own pictures without the subject; to be asked for first while it is the base."""
        how = (view.guidance_scale, view.inference_steps)
        if how not in self._of_base:
            drawn = self._draw(self._settings.other_prompts, self._settings.image_seed + APART, view)
            self._of_base[how] = self._encoders.dino_features(drawn)
        return self._of_base[how]

    def _real_images(self, subject: str, count: int | None) -> list[TrainingImage]:
        settings = self._settings
        plan = ImagePlan(training_resolution(self._pipe, settings.resolution))
        prompt = f"a {settings.name_of(subject)}"
        return load_folder(Path(settings.subjects[subject].images), prompt, plan)[:count]

    def _real_features(self, subject: str) -> tuple[Tensor, Tensor]:
        if subject not in self._real:
            images = [image.image for image in self._real_images(subject, None)]
            self._real[subject] = self._encoders.image_features(images)
        return self._real[subject]

    def _saved_bytes(self, method: Method) -> int:
        with tempfile.TemporaryDirectory() as folder:
            method.save(self._pipe, Path(folder) / "saved")
            return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
