"""`diffusekrona runs` and `tell`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusekrona.cli import app
from diffusekrona.training import TrainingStep
from diffusekrona.training.requests import Request, Requests
from diffusekrona.training.status import StatusWriter


def command(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def writer(tmp_path: Path) -> StatusWriter:
    """Of a run of this process, 50 of whose 200 steps took 30 seconds."""
    writer = StatusWriter(tmp_path / "my-[dog]" / "run", 200)
    for number in range(1, 51):
        writer.step(TrainingStep(number, 200, 0.9, 0.12345, 5e-4, 0.6 * number, 12.3))
    writer.tell("running")
    return writer


def test_runs_are_listed(writer: StatusWriter, tmp_path: Path) -> None:
    StatusWriter(tmp_path / "other" / "run", 7).tell("failed", "There is no image folder [x].")
    lines = [line.split() for line in command("runs", tmp_path).splitlines() if line.strip()]
    assert lines[0] == ["run", "step", "loss", "left", "state"]
    assert ["my-[dog]", "50/200", "0.1235", "0:01:30", "running"] in lines
    assert ["other", "0/7", "–", "–", "failed"] in lines
    assert " ".join(lines[-1]) == "other: There is no image folder [x]."


def test_where_there_is_no_run_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("runs") == f"There is no run in {tmp_path}.\n"


@pytest.mark.usefixtures("writer")
def test_a_run_is_told_things(tmp_path: Path) -> None:
    output = tmp_path / "my-[dog]"
    requests = Requests(output / "run")
    assert "it saves its adapter after the step under way." in command("tell", output, "save")
    command("tell", output / "run", "sample", "--prompt", "a <b>toy</b>")
    command("tell", output, "stop")
    asked = list(requests.due(print, lambda: False))
    assert asked == [Request("save"), Request("sample", "a <b>toy</b>"), Request("stop")]


def test_what_cannot_be_asked_is_one_line(writer: StatusWriter, tmp_path: Path) -> None:
    writer.tell("stopped")
    done = CliRunner().invoke(app, ["tell", str(tmp_path / "my-[dog]"), "save"])
    assert done.exit_code == 1
    assert "it is stopped. Go on with it by `diffusekrona train --resume`." in " ".join(done.output.split())
    assert CliRunner().invoke(app, ["tell", str(tmp_path), "dance"]).exit_code == 2
