"""Whole runs in several processes: what the first one draws and writes, and what the others must not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusekrona.training.run import run
from diffusekrona.training.settings import Settings
from tests.pipelines import tiny_sd_pipeline
from tests.training.processes import both
from tests.training.runs import SMALL, all_close, pictures
from tests.training.test_run import factors
from tests.training.test_sharded import BLOCKS, with_fsdp

PRIOR = {"with_prior_preservation": True, "class_prompt": "a toy", "num_class_images": 3, "sample_batch_size": 2}
SHOWN = {"validation_prompt": ["a sks toy"], "validation_steps": 2, "validation_inference_steps": 2}


def values(folder: Path, name: str) -> dict[str, object]:
    return {
        "pretrained_model_name_or_path": str(folder / "base"),
        "instance_data_dir": str(folder / "images"),
        "instance_prompt": "a sks toy",
        "output_dir": str(folder / name),
        "class_data_dir": str(folder / "class"),
        "max_train_steps": 3,
        "learning_rate": 1e-2,
        **PRIOR,
        **SHOWN,
        **SMALL,
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_sd_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    for number, picture in enumerate(pictures()):
        picture.save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def drawn(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("*-*.png")}


def whole_and_split(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """Two runs; each process says how many class images it drew."""
    seen: list[int] = []
    for name in ("whole", "split"):
        if name == "split":
            with_fsdp(BLOCKS)
        mine = {**values(folder, f"{name} {rank}"), "class_data_dir": str(folder / name)}
        outcome = run(Settings.of(mine), None, lambda done, count: seen.append(done))
        assert bool(outcome.saved) == (rank == 0)
    return {"seen": torch.tensor(seen)}


def test_the_first_of_two_draws_and_writes_and_the_others_weights_are_in_its_pictures(place: Path) -> None:
    first, second = both(whole_and_split, place)
    assert [count for count in first["seen"].tolist() if count] == [2, 3, 2, 3]
    assert second["seen"].tolist() == []
    for name in ("whole", "split"):
        drawn_ones = sorted(path.name[-10:] for path in (place / name).iterdir())
        assert drawn_ones == [f"-0000{number}.png" for number in range(3)]
        assert list((place / f"{name} 1").iterdir()) == []
    run(Settings.of({**values(place, "one"), "class_data_dir": str(place / "whole"), "train_batch_size": 2}))
    expected, shown = factors(place / "one"), drawn(place / "one" / "run" / "validation")
    assert shown.keys() == {"step-00000002-0.png", "step-00000003-0.png"}
    for name in ("whole 0", "split 0"):
        all_close(factors(place / name), expected, rtol=1e-2, atol=1e-4)
        again = drawn(place / name / "run" / "validation")
        assert again.keys() == shown.keys()
        assert max(np.abs(again[key] - shown[key]).max() for key in shown) <= 2


FSDP = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": True,
    },
}


def launched(place: Path) -> subprocess.CompletedProcess[str]:
    """`diffusekrona train`, as a user would start it with accelerate's configuration of FSDP."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (place / "fsdp.yaml").write_text(yaml.safe_dump({**FSDP, "main_process_port": port}))
    (place / "settings.yaml").write_text(yaml.safe_dump(values(place, "toy")))
    command = ["-m", "accelerate.commands.launch", "--config_file", place / "fsdp.yaml", "-m", "diffusekrona.cli"]
    settings = ["train", "--config", place / "settings.yaml"]
    root = Path(__file__).parents[2]
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{root / 'src'}:{root}"}
    return subprocess.run(
        [sys.executable, *map(str, command), *map(str, settings)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_line_trains_by_accelerates_configuration(place: Path) -> None:
    done = launched(place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: ") == 1
    run(Settings.of({**values(place, "one"), "train_batch_size": 2}))
    all_close(factors(place / "toy"), factors(place / "one"), rtol=1e-2, atol=1e-4)
