"""Many subjects over the workers of a Ray cluster, which each test starts in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusekrona.training.many import train_many
from diffusekrona.training.subjects import find_subjects
from tests.pipelines import tiny_sd_pipeline
from tests.training.test_many import shared

pytest.importorskip("ray")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_sd_pipeline().save_pretrained(tmp_path / "base")
    for name, colour in {"bird": "red", "cat": "green", "dog": "blue"}.items():
        (tmp_path / "subjects" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(tmp_path / "subjects" / name / "0.png")
    (tmp_path / "subjects" / "cat" / "0.png").write_bytes(b"no picture")
    return tmp_path


@pytest.fixture
def environment() -> dict[str, str]:
    """A process' environment without anything that another test told Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_workers_leave_what_one_process_leaves_also_where_one_is_killed(
    place: Path, environment: dict[str, str]
) -> None:
    """The worker that trains the dog is killed once it has a checkpoint; another goes on from there."""
    (place / "subjects" / "dog" / "settings.yaml").write_text("max_train_steps: 400\n", encoding="utf-8")
    (place / "shared.yaml").write_text(json.dumps(shared(place / "base")), encoding="utf-8")
    words = ["train-many", "subjects", "out", "--config", "shared.yaml", "--ray", "local", "--at-once", "1"]
    command = [sys.executable, "-c", "from diffusekrona.cli import app; app()", *words]
    with subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            killed = _kill_worker_of(place / "out" / "dog" / "run" / "checkpoints", process)
            said, _ = process.communicate(timeout=400)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert killed, said
    told = {one["name"]: one for one in json.loads((place / "out" / "summary.json").read_text(encoding="utf-8"))}
    assert {name: one["state"] for name, one in told.items()} == {
        "bird": "trained",
        "cat": "set aside",
        "dog": "trained",
    }, said
    assert process.returncode == 1
    assert "cat is set aside" in said
    alone = find_subjects(place / "subjects", place / "alone", shared(place / "base"))
    train_many([subject for subject in alone if subject.name != "cat"])
    for name in ("bird", "dog"):
        here, there = (load_file(place / folder / name / f"{name}.safetensors") for folder in ("out", "alone"))
        for key in there:
            torch.testing.assert_close(here[key], there[key], rtol=1e-3, atol=1e-5)


def _kill_worker_of(checkpoints: Path, process: subprocess.Popen[str]) -> bool:
    """Kill the workers of the process' cluster as soon as there is a checkpoint; whether there was one to kill."""
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        if list(checkpoints.glob("step-*.safetensors")):
            workers = _workers_of(process.pid)
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            return bool(workers)
        time.sleep(0.05)
    return False


def _workers_of(ancestor: int) -> list[int]:
    """Processes of Ray's that run our training, below another process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if title.startswith("ray::train_many") and _descends(int(folder.name), ancestor):
            found.append(int(folder.name))
    return found


def _descends(process: int, ancestor: int) -> bool:
    while process > 1:
        if process == ancestor:
            return True
        try:
            process = int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False
