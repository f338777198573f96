"""Requests for many adapters, beside a server that switches them: `python -m benchmarks.serve`.

`diffusekrona serve` gathers up to eight pictures, each with its own adapter, into a batch. The other server, on the
same Ray Serve, draws one picture after the other: it loads an adapter by `load_krona` when it is first asked for,
switches by `set_adapters`, and keeps the last 32. Both draw on the repository's small base (64 x 64 pixels, four steps,
fp32, with guidance) on this machine's CPU, with adapters of factors (2, 4). Sixteen clients ask on the loopback
interface, each for one picture after the other; the n-th adapter is asked for 1 / n as often as the first. Servers are
started anew for each row, and requests that warm them up do not count. It ends by itself after some minutes. Writes
`benchmarks/results/serve.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "serve.md"
BASE = ROOT / "models" / "emoji-sdxl"
COUNTS = (1, 10, 100, 1000)
DISTINCT = 20
CLIENTS, REQUESTS, WARMING = 16, 96, 16
STEPS = 4
KEPT = 32
HOST = "127.0.0.1"
READY_SECONDS = 300


def make_adapters(folder: Path) -> None:
    """A thousand adapters, of which some are the same file by several names."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    from diffusekrona import KronAConfig, inject_krona, save_krona, unload_krona

    pipe = StableDiffusionXLPipeline.from_pretrained(BASE)
    for number in range(DISTINCT):
        torch.manual_seed(number)
        krona = inject_krona(pipe, KronAConfig(a1=2, a2=4, init_b="normal"))
        for factor in krona.parameters():
            factor.data *= 0.3
        save_krona(pipe, folder / f"subject{number}.safetensors")
        unload_krona(pipe)
    for number in range(DISTINCT, max(COUNTS)):
        os.link(folder / f"subject{number % DISTINCT}.safetensors", folder / f"subject{number}.safetensors")


def serve_by_switching(folder: Path, port: int) -> None:
    """The other server, until it is told to stop."""
    from diffusekrona.serving.environment import prepare

    prepare()
    import ray
    from ray import serve

    ray.init("local", include_dashboard=False)
    serve.start(http_options={"host": HOST, "port": port})
    deployment = serve.deployment(Switching).options(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=1000)
    serve.run(deployment.bind(str(folder)), route_prefix="/")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    ray.shutdown()


class Switching:
    """Draws one picture after the other, each with the adapter that is active."""

    def __init__(self, folder: str) -> None:
        from diffusers import StableDiffusionXLPipeline

        self._folder, self._pipe = Path(folder), StableDiffusionXLPipeline.from_pretrained(BASE)
        self._pipe.set_progress_bar_config(disable=True)
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._thread = ThreadPoolExecutor(1)

    async def __call__(self, request: Any) -> Any:
        if request.url.path == "/health":
            return {"status": "ok"}
        asked = await request.json()
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._draw, asked)

    def _draw(self, asked: dict[str, Any]) -> Any:
        import torch

        from diffusekrona import load_krona, unload_krona
        from diffusekrona.inputs.images import image_png
        from diffusekrona.serving.endpoint import images_body

        name = asked["model"]
        if name not in self._loaded:
            load_krona(self._pipe, self._folder / f"{name}.safetensors", name)
            if len(self._loaded) >= KEPT:
                unload_krona(self._pipe, self._loaded.popitem(last=False)[0])
        self._loaded[name] = None
        self._loaded.move_to_end(name)
        self._pipe.set_adapters(name)
        seed = torch.Generator().manual_seed(asked["seed"])
        images = self._pipe(asked["prompt"], generator=seed, num_inference_steps=asked["num_inference_steps"]).images
        return images_body([image_png(images[0])])


@contextmanager
def started(command: Sequence[object]) -> Iterator[str]:
    """A server's address, while the block runs."""
    with socket.create_server((HOST, 0)) as found:
        port = found.getsockname()[1]
    words = [sys.executable, "-m", *(str(word) for word in command), "--port", str(port)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
        try:
            address = f"http://{HOST}:{port}"
            _wait(address, process)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{address}/health", timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise SystemExit("A server did not start.")


def load(address: str, adapters: int) -> tuple[float, list[float]]:
    """Requests in a second, and seconds of each."""
    rng = random.Random(adapters)
    names = rng.choices(range(adapters), [1 / (n + 1) for n in range(adapters)], k=WARMING + REQUESTS)

    with httpx.Client(timeout=600, limits=httpx.Limits(max_connections=CLIENTS)) as client:

        def ask(number: int) -> float:
            began = time.monotonic()
            body = {
                "model": f"subject{names[number]}",
                "prompt": "a sks toy on a blue background",
                "seed": number,
                "num_inference_steps": STEPS,
            }
            client.post(f"{address}/v1/images/generations", json=body).raise_for_status()
            return time.monotonic() - began

        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(ask, range(WARMING)))
            began = time.monotonic()
            taken = list(clients.map(ask, range(WARMING, WARMING + REQUESTS)))
            return REQUESTS / (time.monotonic() - began), taken


def main() -> None:
    """Measure, print and write the table."""
    lines = [
        "| adapters asked for | server | pictures a second | over switching | median s | 95% within s |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(Path(folder))
        ours = ["diffusekrona.cli", "serve", "--base", BASE, "--adapters", folder, "--max-steps", "8"]
        switching = ["benchmarks.serve", "--switching", folder]
        for adapters in COUNTS:
            rates = {}
            for name, command in (("switching", switching), ("gathered batches", ours)):
                with started(command) as address:
                    rates[name], taken = load(address, adapters)
                p95 = statistics.quantiles(taken, n=20)[-1]
                lines.append(
                    f"| {adapters} | {name} | {rates[name]:.2f} | {rates[name] / rates['switching']:.2f} | "
                    f"{statistics.median(taken):.2f} | {p95:.2f} |"
                )
                print(lines[-1], flush=True)
    RESULT.write_text(f"{__doc__}\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--switching", type=Path)
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    if given.switching is None:
        main()
    else:
        serve_by_switching(given.switching, given.port)
