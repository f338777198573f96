"""What a run tells of itself, and what it is asked for, on a tiny base."""

import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusekrona.errors import KronAError
from diffusekrona.files.inspect import inspect_file
from diffusekrona.inputs.captions import read_captions
from diffusekrona.training import TrainingInterrupted, TrainingStep, status
from diffusekrona.training.many import train_many
from diffusekrona.training.progress import Interrupted
from diffusekrona.training.requests import Request, Requests, ask
from diffusekrona.training.run import run
from diffusekrona.training.settings import Settings
from diffusekrona.training.status import Status, StatusWriter, read_status, run_folder, run_name, runs_in
from diffusekrona.training.subjects import Subject
from tests.pipelines import IMAGE_SIZE, tiny_sd_pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny_sd_pipeline().save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for colour in ("red", "green"):
        Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), colour).save(folder / "images" / f"{colour}.png")
    return folder


def settings(place: Path, output: Path, **values: Any) -> Settings:
    given = {
        "pretrained_model_name_or_path": str(place / "base"),
        "instance_data_dir": place / "images",
        "instance_prompt": "a sks toy",
        "output_dir": output,
        "max_train_steps": 4,
        "validation_inference_steps": 1,
        "a1": 2,
        "a2": 4,
    }
    return Settings.of({**given, **values})


@pytest.fixture
def at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "EVERY", 0.0)
    monkeypatch.setattr(status, "SHARE", float("inf"))


def now(output: Path) -> Status:
    found = read_status(output / "run")
    assert found is not None
    return found


@pytest.mark.usefixtures("at_every_step")
def test_a_run_tells_how_far_it_is(place: Path, tmp_path: Path) -> None:
    seen: list[Status] = []
    held_out = {"validation_data_dir": place / "images", "validation_loss_steps": 2}
    outcome = run(settings(place, tmp_path, **held_out), lambda done: seen.append(now(tmp_path)))
    assert [(one.state, one.step, one.steps) for one in seen] == [("running", step, 4) for step in (1, 2, 3, 4)]
    assert [one.loss for one in seen] == list(outcome.result.losses)
    assert seen[-1].left == 0
    last = now(tmp_path)
    assert (last.state, last.step, last.error, last.pid) == ("finished", 4, None, os.getpid())
    assert last.average == outcome.result.final_loss
    assert [step for step, _ in last.curve] == [1, 2, 3, 4]
    assert last.validation_losses == outcome.result.validation_losses


def test_a_run_waits_before_its_first_step_and_says_why_it_failed(place: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusekrona.training.run.base_of", lambda chosen: seen.append(now(tmp_path).state) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(settings(place, tmp_path))
    assert seen == ["waiting"]
    assert (now(tmp_path).state, now(tmp_path).error) == ("failed", "division by zero")


@pytest.mark.usefixtures("at_every_step")
def test_what_a_run_is_asked_for_is_done(place: Path, tmp_path: Path) -> None:
    def on_step(done: TrainingStep) -> None:
        if done.step == 1:
            for asked in (Request("save"), Request("sample"), Request("sample", "a <b>sks</b> toy"), Request("stop")):
                ask(tmp_path / "run", asked)

    chosen = settings(place, tmp_path, max_train_steps=9, validation_prompt=["a toy"])
    with pytest.raises(TrainingInterrupted) as stopped:
        run(chosen, on_step)
    assert stopped.value.step == 3, "the step after the one that it was asked after"
    assert inspect_file(tmp_path / "run" / "steps" / f"{tmp_path.name}-step00000002.safetensors").kind == "krona"
    pictures = tmp_path / "run" / "validation"
    assert (pictures / "step-00000002-0.png").is_file()
    assert read_captions(pictures, ["asked-00000002-0.png"]).by_name == {"asked-00000002-0.png": "a <b>sks</b> toy"}
    assert (now(tmp_path).state, now(tmp_path).step) == ("stopped", 3)
    assert list((tmp_path / "run" / "requests").iterdir()) == []

    outcome = run(settings(place, tmp_path, max_train_steps=9, validation_prompt=["a toy"], resume=True))
    assert outcome.result.resumed_at == 3
    assert [step for step, _ in now(tmp_path).curve] == list(range(1, 10))


@pytest.mark.usefixtures("at_every_step")
def test_a_run_that_is_paused_waits_until_it_is_told_to_go_on(place: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(0.01):
            if now(tmp_path).state == "paused":
                seen.append(("paused", now(tmp_path).step))
                ask(tmp_path / "run", Request("resume"))
                return

    def on_step(done: TrainingStep) -> None:
        seen.append(("step", done.step))
        if done.step == 1:
            ask(tmp_path / "run", Request("pause"))

    other = threading.Thread(target=go_on)
    other.start()
    try:
        run(settings(place, tmp_path), on_step)
    finally:
        ended.set()
        other.join()
    assert seen == [("step", 1), ("paused", 2), ("step", 2), ("step", 3), ("step", 4)]


def test_a_run_that_waits_can_be_stopped(tmp_path: Path) -> None:
    StatusWriter(tmp_path, 9)
    requests, told = Requests(tmp_path), []
    for what in ("pause", "pause"):
        ask(tmp_path, Request(what))
    asked = Interrupted()
    asked.ask()
    assert list(requests.due(told.append, asked)) == []
    assert told == ["paused", "running"]
    ask(tmp_path, Request("pause"))
    ask(tmp_path, Request("stop"))
    asked = Interrupted()
    for request in requests.due(told.append, asked):
        assert request.what == "stop"
        asked.ask()
    assert told == ["paused", "running"] * 2


def test_an_earlier_runs_requests_and_files_that_are_none_are_forgotten(tmp_path: Path) -> None:
    StatusWriter(tmp_path, 9)
    ask(tmp_path, Request("stop"))
    requests = Requests(tmp_path)
    for name, text in {
        "a": "{", "b": "[]", "c": '{"what": "rm"}', "d": '{"what": "save", "prompt": 1}', "e": "null",
    }.items():  # fmt: skip
        (tmp_path / "requests" / f"{name}.json").write_text(text)
    assert list(requests.due(print, Interrupted())) == []
    assert list((tmp_path / "requests").iterdir()) == []


def test_what_cannot_be_drawn_is_a_warning(place: Path, tmp_path: Path, caplog: Any) -> None:
    run(settings(place, tmp_path), lambda done: ask(tmp_path / "run", Request("sample")) if done.step < 3 else None)
    told = [record.getMessage() for record in caplog.records if "asked for" in record.getMessage()]
    assert (
        told
        == [
            "The pictures that were asked for could not be drawn: the run has no validation_prompt, and none was given."
        ]
        * 2
    )


def test_only_a_run_with_a_process_can_be_asked(place: Path, tmp_path: Path) -> None:
    with pytest.raises(KronAError, match="it is no run"):
        ask(tmp_path, Request("save"))
    run(settings(place, tmp_path))
    with pytest.raises(KronAError, match="it is finished"):
        ask(tmp_path / "run", Request("save"))
    StatusWriter(tmp_path / "run", 4)
    with pytest.raises(KronAError, match="A prompt is for sample, not for save"):
        ask(tmp_path / "run", Request("save", "a toy"))


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "running"),
        ({"began": 1.0}, "killed"),
        ({"host": "elsewhere", "pid": 1 << 30}, "running"),
        ({"pid": 1 << 30}, "killed"),
        ({"pid": 1 << 30, "state": "paused"}, "killed"),
        ({"pid": 1 << 30, "state": "finished"}, "finished"),
    ],
    ids=str,
)
def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path, change: dict[str, Any], state: str) -> None:
    StatusWriter(tmp_path, 9)
    values = {**json.loads((tmp_path / "status.json").read_text()), "state": "running", "later": 1, **change}
    (tmp_path / "status.json").write_text(json.dumps(values))
    found = read_status(tmp_path)
    assert found is not None
    assert found.state == state


def test_a_process_that_nobody_waited_for_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()  # which ends when it does
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    left = Status("running", pid=child.pid, began=status._began(child.pid), host=socket.gethostname())
    (tmp_path / "status.json").write_text(json.dumps(asdict(left)))
    found = read_status(tmp_path)
    assert found is not None
    assert found.state == "killed"
    child.wait()


@pytest.mark.usefixtures("at_every_step")
def test_a_full_disk_costs_the_training_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(status, "replace_file", full)
    assert run(settings(place, tmp_path)).result.steps == 4
    (told,) = [record.getMessage() for record in caplog.records if "status" in record.getMessage()]
    assert "the training goes on without: [Errno 28] No space left" in told


def test_writing_takes_no_more_than_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [0.0], []

    def slow(path: Path, text: str) -> None:
        clock[0] += 0.5
        written.append(json.loads(text)["step"])

    monkeypatch.setattr(status, "replace_file", slow)
    monkeypatch.setattr(status.time, "monotonic", lambda: clock[0])
    writer = StatusWriter(tmp_path, 1000)
    for number in range(1, 1000):
        clock[0] += 1.0
        writer.step(TrainingStep(number, 1000, 0.5, 0.5, 1e-3, clock[0], 1.0))
    assert 0.5 * len(written) <= 0.01 * clock[0] + 1


def test_the_course_has_a_bounded_number_of_points(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, 5000)
    for number in range(1, 5001):
        writer.step(TrainingStep(number, 5000, 1 / number, 1 / number, 1e-3, 1.0, 1.0))
    found = read_status(tmp_path)
    assert found is not None
    steps = [step for step, _ in found.curve]
    assert status.POINTS / 2 <= len(steps) <= status.POINTS
    assert steps == sorted(set(steps))
    assert steps[-1] > 4900


def test_runs_are_found_below_a_folder_and_named_by_their_outputs(tmp_path: Path) -> None:
    for name in ("b/run", "a/deep/run", ".hidden/run", "a/deep/run/inside"):
        StatusWriter(tmp_path / name, 4)
    (tmp_path / "broken" / "run").mkdir(parents=True)
    (tmp_path / "broken" / "run" / "status.json").write_text("{")
    assert [run_name(path, tmp_path) for path, _ in runs_in(tmp_path)] == ["a/deep", "b"]
    assert run_folder(tmp_path / "b") == tmp_path / "b" / "run" == run_folder(tmp_path / "b" / "run")
    assert run_folder(tmp_path / "b.safetensors") == tmp_path / "b" / "run"
    with pytest.raises(KronAError, match="is no run"):
        run_folder(tmp_path)


@pytest.mark.usefixtures("at_every_step")
def test_each_of_many_subjects_has_a_status_and_any_of_them_stops_all(place: Path, tmp_path: Path) -> None:
    subjects = [Subject(name, settings(place, tmp_path / name)) for name in ("one", "two")]
    bad = Subject("bad", settings(place, tmp_path / "bad", instance_data_dir=tmp_path / "none"))
    train_many([*subjects, bad], at_once=2)
    assert [now(tmp_path / name).state for name in ("one", "two", "bad")] == ["finished", "finished", "failed"]
    assert "no image folder" in str(now(tmp_path / "bad").error)

    def on_step(name: str, done: TrainingStep) -> None:
        if (name, done.step) == ("two", 1):
            ask(tmp_path / "two" / "run", Request("stop"))

    again = [replace(one, settings=settings(place, tmp_path / one.name, overwrite=True)) for one in subjects]
    with pytest.raises(TrainingInterrupted):
        train_many(again, at_once=2, on_step=on_step)
    assert [now(tmp_path / name).state for name in ("one", "two")] == ["stopped", "stopped"]


def test_weights_that_are_split_cannot_be_drawn_by_one_process(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("diffusekrona.training.observers.sharding_of", lambda state: object())
    asked = Request("sample", "a toy")
    run(settings(place, tmp_path), lambda done: ask(tmp_path / "run", asked) if done.step == 1 else None)
    assert any("FSDP splits them" in record.getMessage() for record in caplog.records)
