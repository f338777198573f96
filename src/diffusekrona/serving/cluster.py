"""Ray: started on this machine, or joined where it runs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import KronAError

LOCAL = "local"
"""Address of a cluster that is started on this machine and ends with its user."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # which would be sent away
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # which would install packages anew for each worker
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_SECONDS = 5.0


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The package `ray`, connected to a cluster for a while.

    Args:
        address: `host:port` of the cluster's head, or of its client server as `ray://host:port`; or "local".

    Raises:
        KronAError: Ray is not installed, or nobody answers at the address.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise KronAError("Ray is not installed: pip install 'diffusekrona[serve]'.") from error
    check_reachable(address)
    ray.init(address, include_dashboard=False if address == LOCAL else None, logging_level=logging.WARNING)
    try:
        yield ray
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raise `KronAError` where nobody answers, as Ray itself tries again for minutes."""
    if address == LOCAL:
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise KronAError(f'{address!r} is no address of a Ray cluster: give host:port, ray://host:port, or "{LOCAL}".')
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise KronAError(
            f"No Ray cluster answers at {address}: {error}. Start Ray there, or check the address."
        ) from error
