"""A server, from its settings to its end: Ray started here, or joined by its address."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import KronAError
from .cluster import check_answers
from .environment import check_installed, check_loopback, prepare, prepare_own
from .listing import Listing
from .settings import ServeSettings

_NAME = "diffusekrona"
_OBJECT_STORE = 256 << 20


def serve(settings: ServeSettings, on_ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve until the process is told to stop, by Ctrl-C or SIGTERM.

    Args:
        settings: what is served, and where.
        on_ready: called with the endpoint's address when it answers.

    Raises:
        KronAError: Ray is not installed, the address does not answer, the port is taken, there are no such adapters, or
            the base cannot be loaded.
    """
    with running(settings) as address, _stopped_by_signals() as stop:  # in this order, since Ray sets its own handlers
        on_ready(address)
        stop.wait()


@contextmanager
def running(settings: ServeSettings, **other: Any) -> Iterator[str]:
    """Serve while the block runs; the value is the endpoint's address. What else `application` takes is for it.

    Raises:
        KronAError: as `serve`.
    """
    if settings.ray is None:
        _check_here(settings)
        prepare_own(max(1, (os.cpu_count() or 1) // settings.replicas))
    else:
        check_answers(settings.ray)
        prepare()
    check_installed()
    import ray
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _join(ray, settings)
    try:
        _deploy(ray, ray_serve, settings, other)
        if settings.ray is None:
            check_loopback(settings.port)
        yield f"http://{_bracketed(settings.host)}:{settings.port}"
    finally:
        if settings.ray is not None:  # or else all that was started ends with Ray
            with suppress(Exception):
                ray_serve.delete(_NAME)
        ray.shutdown()


def _check_here(settings: ServeSettings) -> None:
    """What would fail in a process of Ray's, where the reason is hard to find."""
    from ..bases.loading import base_configs

    Listing(settings.source)
    folder = base_configs(settings.base)
    if not (folder / "model_index.json").is_file():
        raise KronAError(f"The base {folder} has no model_index.json, so it is not a Diffusers pipeline's folder.")
    try:
        with socket.create_server((settings.host, settings.port)):
            pass
    except OSError as error:
        raise KronAError(f"Nothing can listen on {settings.host}, port {settings.port}: {error}.") from error


def _join(ray: Any, settings: ServeSettings) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if settings.ray is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
            "num_cpus": max(settings.replicas, os.cpu_count() or 1),
            "_metrics_export_port": settings.metrics_port,
        }
    else:
        options |= {"address": settings.ray}
    try:
        ray.init(**options)
    except Exception as error:
        raise KronAError(f"Ray could not be {'started' if settings.ray is None else 'joined'}: {error}") from error


def _deploy(ray: Any, ray_serve: Any, settings: ServeSettings, other: Mapping[str, Any]) -> None:
    from .replicas import application

    gpus = settings.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    ray_serve.start(
        proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port}, logging_config=_QUIET
    )
    try:
        ray_serve.run(application(settings, gpus, **other), name=_NAME, route_prefix="/", logging_config=_QUIET)
    except RuntimeError as error:
        raise KronAError(f"The server did not start: {error}") from error


_QUIET = {"log_level": "WARNING", "enable_access_log": False}


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    stop = threading.Event()

    def asked(number: int, frame: Any) -> None:
        stop.set()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
