"""The demo's whole flow on a tiny random pipeline: what it writes, and that its numbers mean what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from diffusekrona import KronAConfig, load_krona
from diffusekrona.errors import KronAError
from diffusekrona.training import TrainingConfig
from research.demo.personalise import DemoPaths, run_demo
from research.demo.result import DemoResult, write_markdown
from tests.pipelines import tiny_sdxl_pipeline

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    folder = tmp_path_factory.mktemp("demo")
    tiny_sdxl_pipeline().save_pretrained(folder / "base")
    return DemoPaths(
        base=folder / "base",
        judge=ROOT / "models" / "emoji-classifier",
        subject=ROOT / "examples" / "toy-bear",
        output=folder / "output",
    )


@pytest.fixture(scope="module")
def stages() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(paths: DemoPaths, stages: list[str]) -> DemoResult:
    return run_demo(
        paths,
        krona=KronAConfig(a1=2, a2=8),
        training=TrainingConfig(max_train_steps=3, learning_rate=5e-2),
        generation_steps=2,
        on_stage=stages.append,
    )


def test_it_leaves_the_adapter_the_picture_and_the_table(paths: DemoPaths, result: DemoResult) -> None:
    load_krona(tiny_sdxl_pipeline(), paths.output / "toy-bear.safetensors")
    with Image.open(result.picture) as picture:
        assert picture.width > picture.height > 300
    table = (paths.output / "demo.md").read_text(encoding="utf-8")
    assert f"{result.parameters:,}" in table
    assert "every bit restored" in table


def test_merged_and_unmerged_pictures_agree_and_unmerging_is_exact(result: DemoResult) -> None:
    assert result.merged_difference <= 2
    assert result.unmerge_exact
    assert 0 < result.stored_entries < 0.5


def test_its_numbers_are_shares_and_sizes(paths: DemoPaths, result: DemoResult) -> None:
    assert result.file_bytes == (paths.output / "toy-bear.safetensors").stat().st_size
    assert 4 * result.parameters < result.file_bytes < 4 * result.parameters + 50_000
    assert 0 <= result.background_base <= 1
    assert -1 <= result.similarity_base < result.similarity_ceiling < 1
    assert 0 < result.training_seconds < result.seconds


def test_it_tells_what_it_is_doing(result: DemoResult, stages: list[str]) -> None:
    assert [stage.split()[0] for stage in stages] == ["the", "training", "a", "merging", "drawing"]


def test_a_missing_folder_is_named(paths: DemoPaths, tmp_path: Path) -> None:
    with pytest.raises(KronAError, match=r"base model should be in .*nowhere.*clone of the repository"):
        run_demo(replace(paths, base=tmp_path / "nowhere"))


def test_the_table_says_when_unmerging_failed(result: DemoResult, tmp_path: Path) -> None:
    write_markdown(replace(result, unmerge_exact=False), tmp_path / "demo.md")
    assert "NOT restored" in (tmp_path / "demo.md").read_text(encoding="utf-8")
