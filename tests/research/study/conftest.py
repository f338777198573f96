"""A whole setting in small: tiny pipeline, tiny encoders, two subjects of noise."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from research.study.settings import StudySettings, Subject
from tests.evaluation.models import save_clip, save_vit
from tests.pipelines import IMAGE_SIZE, tiny_sdxl_pipeline


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> StudySettings:
    folder = tmp_path_factory.mktemp("study")
    tiny_sdxl_pipeline(prediction_type="v_prediction").save_pretrained(folder / "base")
    save_clip(folder / "clip")
    save_vit(folder / "vit")
    return StudySettings(
        base=str(folder / "base"),
        clip=str(folder / "clip"),
        dino=str(folder / "vit"),
        subjects={
            name: Subject(str(_pictures(folder / name, seed)), "toy")
            for seed, name in enumerate(("bear", "car", "cup"))
        },
        held_back=("cup",),
        prompts=("a {} on a red background", "a small {} on a blue background"),
        other_prompts=("a fox",),
        training={"max_train_steps": 2, "train_batch_size": 1},
        inference_steps=1,
        guidance_scale=1.0,
        scenes=True,
    )


def _pictures(folder: Path, seed: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(2):
        pixels = rng.integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
