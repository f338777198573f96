"""Processes of their own, for all of which libraries are imported once."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.training.runs"])

Work = Callable[[int, Path], dict[str, torch.Tensor]]
"""What one process does, told its number and a folder."""


def started(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that runs a function of a test module."""
    process = _CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def both(work: Work, folder: Path) -> list[dict[str, torch.Tensor]]:
    """What two processes, started as accelerate starts them, make of some work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [started(_as_one_of_two, rank, port, work, folder) for rank in (0, 1)]
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


def _as_one_of_two(rank: int, port: int, work: Work, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    save_file(work(rank, folder), folder / f"{rank}.safetensors")
