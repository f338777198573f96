"""Ray: started on this machine, or joined where it runs."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import KronAError
from .environment import check_installed, prepare, prepare_own

LOCAL = "local"
"""Address of a cluster that is started on this machine and ends with its user."""

_CONNECT_SECONDS = 5.0


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The package `ray`, connected to a cluster for a while.

    Args:
        address: `host:port` of the cluster's head, or of its client server as `ray://host:port`; or "local".

    Raises:
        KronAError: Ray is not installed, or nobody answers at the address.
    """
    if address == LOCAL:
        prepare_own(threads=1)
    else:
        check_answers(address)
        prepare()
    check_installed()
    import ray

    ray.init(address, include_dashboard=False if address == LOCAL else None, logging_level=logging.WARNING)
    try:
        yield ray
    finally:
        ray.shutdown()


def check_answers(address: str) -> None:
    """Raise `KronAError` unless something answers at a cluster's address; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise KronAError(f"ray must be an address such as 10.0.0.1:6379, not {address!r}.")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise KronAError(
            f"No Ray cluster answers at {address} ({error}). `ray status` on its head node tells the address."
        ) from error
