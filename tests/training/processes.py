"""Processes of their own, for all of which libraries are imported once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.training.runs"])


def started(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that runs a function of a test module."""
    process = _CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process
