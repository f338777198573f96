"""Scores of the adapters that a run saved."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusekrona import KronAConfig, inject_krona, load_krona, save_krona
from diffusekrona.evaluation import Encoders, evaluate_subject
from diffusekrona.generation import generate_images
from diffusekrona.training import TrainingConfigError
from diffusekrona.training.run import run
from diffusekrona.training.scores import AdapterScores, best_of, score_adapters, scores_rows
from diffusekrona.training.settings import Settings
from tests.evaluation.models import save_clip, save_vit
from tests.pipelines import tiny_sd_pipeline
from tests.training.runs import pictures

PROMPTS = ["a sks toy", "a sks toy on sand"]
OPTIONS = {"steps": 2, "height": 32, "width": 32, "seed": 3}


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    save_clip(folder / "clip")
    save_vit(folder / "dino")
    return folder


def adapter(path: Path, strength: float) -> Path:
    pipe = tiny_sd_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        krona = inject_krona(pipe, KronAConfig(a1=4, a2=8, init_b="normal", alpha=strength))
    del krona
    return save_krona(pipe, path)


def test_each_adapter_is_scored_by_its_own_pictures_and_the_base_is_left_alone(judges: Path, tmp_path: Path) -> None:
    encoders = Encoders(str(judges / "clip"), str(judges / "dino"))
    files = [adapter(tmp_path / f"{number}.safetensors", strength) for number, strength in enumerate((1.0, 20.0))]
    pipe, real = tiny_sd_pipeline(), pictures(3)
    before = generate_images(pipe, PROMPTS, **OPTIONS)
    found = score_adapters(pipe, files, PROMPTS, real, encoders, **OPTIONS)
    after = generate_images(pipe, PROMPTS, **OPTIONS)
    assert all(np.array_equal(first, second) for first, second in zip(before, after, strict=True))
    for file, scores in zip(files, found, strict=True):
        alone = tiny_sd_pipeline()
        load_krona(alone, file)
        expected = evaluate_subject(encoders, real, generate_images(alone, PROMPTS, **OPTIONS), PROMPTS)
        assert scores.file == file.name
        assert scores.dino == pytest.approx(expected.dino.mean, abs=1e-3)
        assert scores.clip_t == pytest.approx(expected.clip_t.mean, abs=1e-3)
    assert found[0].clip_i != found[1].clip_i


def test_the_best_is_best_in_most_and_of_equals_the_first() -> None:
    one, two = AdapterScores("one", 0.8, 0.30, 0.7), AdapterScores("two", 0.9, 0.29, 0.8)
    assert best_of([one, two]) is two
    assert best_of([two, AdapterScores("three", 0.9, 0.29, 0.8)]) is two
    assert scores_rows([one, two])["two"] == "CLIP-I 0.900, CLIP-T 0.290, DINO 0.800 (best)"


def test_a_run_scores_what_it_saved_and_marks_the_best(judges: Path, tmp_path: Path) -> None:
    tiny_sd_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pictures(2)):
        image.save(tmp_path / "images" / f"{number}.png")
    chosen = Settings.of(
        {
            "pretrained_model_name_or_path": str(tmp_path / "base"), "instance_data_dir": tmp_path / "images",
            "instance_prompt": "a sks toy", "output_dir": tmp_path / "toy", "a1": 4, "a2": 8, "max_train_steps": 4,
            "learning_rate": 1e-2, "save_every": 2, "validation_prompt": PROMPTS, "validation_inference_steps": 1,
            "score": True, "clip": str(judges / "clip"), "dino": str(judges / "dino"),
        }
    )  # fmt: skip
    outcome = run(chosen)
    found = json.loads((tmp_path / "toy" / "run" / "scores.json").read_text())
    names = ["toy-step00000002.safetensors", "toy"]
    assert [one["file"] for one in found["adapters"]] == names
    assert found["best"] in names
    assert f"<td>{found['best']}</td><td>CLIP-I" in outcome.page.read_text()
    assert outcome.page.read_text().count("(best)") == 1


def test_scores_need_pictures() -> None:
    with pytest.raises(TrainingConfigError, match="give validation_prompt"):
        Settings.of({"pretrained_model_name_or_path": "b", "instance_data_dir": "i", "output_dir": "o", "score": True})
