"""The server as users start it, in a process of its own, with OpenAI's client."""

from __future__ import annotations

import base64
import io
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import psutil
import pytest
from PIL import Image

from diffusekrona import AdapterStore
from diffusekrona.errors import KronAError
from diffusekrona.serving.cluster import check_answers
from diffusekrona.serving.drawing import Drawer
from diffusekrona.serving.picture import Picture
from diffusekrona.serving.server import running
from diffusekrona.serving.settings import ServeSettings
from tests.pipelines import tiny_sdxl_pipeline
from tests.serving.adapters import folder_of
from tests.serving.processes import clean_environment, free_port, listening, painters, served, wait_for

NAMES = ("dog", "cat", "fox", "hen")

ray = pytest.mark.xdist_group("ray")


class Server(NamedTuple):
    process: psutil.Process
    port: int
    metrics: int
    client: openai.OpenAI
    folder: Path
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two copies of the tiny base, with four adapters, one damaged, and a token."""
    room = tmp_path_factory.mktemp("served")
    folder = folder_of(room / "adapters", *NAMES)
    (folder / "bad.safetensors").write_bytes(b"noise")
    tiny_sdxl_pipeline().save_pretrained(room / "base")
    log, metrics = room / "log.txt", free_port()
    options = ["--base", room / "base", "--adapters", folder, "--replicas", 2, "--steps", 2, "--guidance-scale", 3]
    options += ["--metrics-port", metrics, "--batch-size", 4, "--queue", 16, "--max-steps", 400]
    with served(log, *options, DIFFUSEKRONA_TOKEN="secret") as (process, port):
        address = f"http://127.0.0.1:{port}/v1"
        client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0, timeout=120)
        yield Server(process, port, metrics, client, folder, log)


def pixels(answer: Any) -> list[np.ndarray[Any, Any]]:
    encoded = [base64.b64decode(one.b64_json) for one in answer.data]
    return [np.asarray(Image.open(io.BytesIO(png)), float) for png in encoded]


def draw(server: Server, model: str, seed: int, **more: Any) -> list[np.ndarray[Any, Any]]:
    given = {"extra_body": {"seed": seed, **more.pop("extra", {})}, **more}
    return pixels(server.client.images.generate(model=model, prompt=f"a toy {seed % 10}", **given))


def expected(folder: Path, model: str, seed: int) -> np.ndarray[Any, Any]:
    pipe = tiny_sdxl_pipeline()
    picture = Picture(model, f"a toy {seed % 10}", seed, steps=2, guidance_scale=3.0)
    (png,) = Drawer(pipe, AdapterStore(pipe, folder)).draw([picture])
    assert isinstance(png, bytes)
    return np.asarray(Image.open(io.BytesIO(png)), float)


@ray
@pytest.mark.slow
def test_openais_client_gets_pictures_models_and_errors(server: Server) -> None:
    listed = [model.id for model in server.client.models.list()]
    assert listed == sorted([*NAMES, "bad"])
    assert server.client.models.retrieve("dog").id == "dog"
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: draw(server, NAMES[number % 4], number), range(8)))
    for number, (one,) in enumerate(found):
        assert np.abs(one - expected(server.folder, NAMES[number % 4], number)).max() <= 2
    three = draw(server, "dog", 4, n=3, size="64x80", response_format="b64_json", user="someone")
    assert [one.shape for one in three] == [(80, 64, 3)] * 3
    with pytest.raises(openai.NotFoundError, match="no model 'cow'"):
        draw(server, "cow", 0)
    with pytest.raises(openai.BadRequestError, match="keeps none for a url") as refused:
        draw(server, "dog", 0, response_format="url")
    assert refused.value.param == "response_format"
    with pytest.raises(openai.UnprocessableEntityError, match="'bad' cannot be used"):
        draw(server, "bad", 0)
    stranger = openai.OpenAI(base_url=server.client.base_url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="token is missing or wrong"):
        stranger.models.list()


@ray
@pytest.mark.slow
def test_nothing_of_it_can_be_reached_from_other_machines(server: Server) -> None:
    found = listening(server.process)
    assert {port for _, port in found} >= {server.port, server.metrics}
    assert {ip for ip, _ in found} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@ray
@pytest.mark.slow
def test_the_queue_has_an_end_and_who_leaves_frees_his_place(server: Server) -> None:
    started = time.monotonic()
    hasty = server.client.with_options(timeout=1.5)

    def leave(seed: int) -> str:
        try:
            hasty.images.generate(
                model="dog", prompt="a toy", size="256x256", n=4, extra_body={"seed": seed, "num_inference_steps": 400}
            )
        except openai.APITimeoutError:
            return "left"
        except openai.RateLimitError:
            return "refused"
        return "drawn"

    with ThreadPoolExecutor(20) as threads:
        outcomes = list(threads.map(leave, range(20)))
    assert set(outcomes) == {"left", "refused"}
    draw(server, "cat", 1)  # which would wait for minutes behind those who left
    assert time.monotonic() - started < 60


@ray
@pytest.mark.slow
def test_metrics_are_rays(server: Server) -> None:
    def told() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics") as answer:
            text = answer.read().decode()
        names = ["diffusekrona_pictures_total", "diffusekrona_batch_size_count", "serve_num_http_requests_total"]
        return all(re.search(rf"^ray_{name}\{{.* [1-9]", text, re.MULTILINE) for name in names)

    wait_for(told, 60, server.log)


@ray
@pytest.mark.slow
def test_a_copy_that_is_killed_under_load_costs_no_request(server: Server) -> None:
    victim, other = painters(server.process)
    done: list[int] = []

    def ask(seed: int) -> np.ndarray[Any, Any]:
        (one,) = draw(server, NAMES[seed % 4], seed, extra={"num_inference_steps": 20})
        done.append(seed)
        return one

    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(ask, seed) for seed in range(48)]
        wait_for(lambda: len(done) > 6, 120, server.log)
        victim.send_signal(signal.SIGKILL)
        at_death = len(done)
        found = [one.result(timeout=300) for one in asked]
    assert at_death < 40
    assert len(found) == 48
    again = draw(server, NAMES[7 % 4], 7, extra={"num_inference_steps": 20})[0]
    assert np.abs(found[7] - again).max() <= 2
    assert other.is_running()
    wait_for(lambda: len(painters(server.process)) == 2, 240, server.log)
    assert {ip for ip, _ in listening(server.process)} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


# Without Ray


@pytest.mark.parametrize(
    ("address", "text"),
    [("127.0.0.1:1", "No Ray cluster answers at 127.0.0.1:1"), ("here", "such as 10.0.0.1:6379"), ("a:b", "such as")],
)
def test_an_address_without_a_cluster_is_told_at_once(address: str, text: str) -> None:
    started = time.monotonic()
    with pytest.raises(KronAError, match=text):
        check_answers(address)
    assert time.monotonic() - started < 10


def test_an_address_that_does_not_answer_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    def silent(address: object, timeout: float) -> None:
        waited.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr("diffusekrona.serving.cluster.socket.create_connection", silent)
    with pytest.raises(KronAError, match=r"No Ray cluster answers at ray://10\.0\.0\.1:6379 \(timed out\)"):
        check_answers("ray://10.0.0.1:6379")
    assert waited[0] <= 10


def test_what_is_wrong_is_told_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusekrona.serving.server.check_installed", lambda: pytest.fail("goes on to Ray"))
    tiny_sdxl_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "adapters").mkdir()
    whole = {"base": str(tmp_path / "base"), "adapters": [str(tmp_path / "adapters")], "port": free_port()}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for changed, text in (
            ({"adapters": [str(tmp_path / "missing")]}, "The adapters' folder"),
            ({"base": str(tmp_path)}, r"no model_index\.json"),
            ({"port": taken.getsockname()[1]}, r"Nothing can listen on 127\.0\.0\.1"),
            ({"ray": "127.0.0.1:1"}, "No Ray cluster answers"),
        ):
            with pytest.raises(KronAError, match=text), running(ServeSettings(**{**whole, **changed})):
                pass


@pytest.mark.slow
def test_it_is_a_sentence_of_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffusekrona.cli", "serve", "--base", "b", "--adapters", str(tmp_path / "missing")],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(),
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "Error: The adapters' folder" in done.stderr
    assert "Traceback" not in done.stderr
