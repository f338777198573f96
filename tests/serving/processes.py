"""A server in a process group of its own, with an environment that no other Ray has touched."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 420
"""Which is long: Ray starts a dozen processes, on machines that do other things meanwhile."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def clean_environment(**more: str) -> dict[str, str]:
    """Without what another Ray, or this machine's, may have left, but for one thing: variables that must not matter."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DIFFUSEKRONA_"))}
    return {**kept, "RAY_ADDRESS": "127.0.0.1:1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


@contextmanager
def served(log: Path, *arguments: object, **environment: str) -> Iterator[tuple[psutil.Process, int]]:
    """`diffusekrona serve` with these arguments, until the block ends; the value is its process and port."""
    port = free_port()
    command = [sys.executable, "-m", "diffusekrona.cli", "serve", "--port", port, *arguments]
    with log.open("w") as output:
        started = subprocess.Popen(
            [str(word) for word in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=clean_environment(**environment),
            start_new_session=True,
        )
        family = Family(started.pid)
        try:
            wait_for(lambda: "Ready: " in log.read_text() or started.poll() is not None, START_SECONDS, log)
            assert started.poll() is None, log.read_text()
            yield psutil.Process(started.pid), port
        finally:
            family.end(started)


class Family:
    """A process and all that it started, however they named their groups."""

    def __init__(self, pid: int) -> None:
        self._first = psutil.Process(pid)

    def end(self, started: subprocess.Popen[Any]) -> None:
        """End them, in peace if they go within a minute."""
        with suppress(psutil.NoSuchProcess):
            children = self._first.children(recursive=True)
            started.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                started.wait(60)
            for one in [*children, self._first]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        started.wait(60)


def wait_for(true: Any, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} seconds:\n{log.read_text()[-4000:]}"
        time.sleep(0.2)


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Where a process and those below it can be reached."""
    found: set[tuple[str, int]] = set()
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            found |= {
                (at.laddr.ip, at.laddr.port)
                for at in one.net_connections(kind="tcp")
                if at.status == psutil.CONN_LISTEN
            }
    return found


def painters(process: psutil.Process) -> list[psutil.Process]:
    """The copies of the base below a server."""
    found = []
    for one in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ServeReplica" in " ".join(one.cmdline()) and "painter" in " ".join(one.cmdline()):
                found.append(one)
    return found
