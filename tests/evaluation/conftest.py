"""Encoders with random weights, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusekrona.evaluation import Encoders
from tests.evaluation.models import save_clip, save_dinov2, save_vit


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="session")
def encoders(clip_folder: Path, vit_folder: Path) -> Encoders:
    return Encoders(clip_folder, vit_folder, batch_size=2)
