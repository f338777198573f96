"""What must be set before Ray is loaded, since it reads its environment then."""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import MutableMapping
from contextlib import suppress

import psutil

from ..errors import KronAError

_SET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is told to anyone
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers run in this environment, however the command was started
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the endpoint needs no GPU, and hides none from its children
}
LOOPBACK = "DIFFUSEKRONA_LOOPBACK"
"""Tells our processes in Ray that nothing but the endpoint may be reached from other machines."""

_UNSET = (
    LOOPBACK,
    "RAY_ADDRESS",  # a cluster is joined when it is asked for, not because of a variable that was left
    "RAY_RUNTIME_ENV_HOOK",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
)


_TOKEN = secrets.token_hex(32)
"""Of this process, which reads it once, however often it starts a Ray."""


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the environment for Ray, in which its processes start, too."""
    environment.update(_SET)
    for name in _UNSET:
        environment.pop(name, None)


def prepare_own(threads: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the environment for a Ray that is started here, and that nobody else is to reach.

    Whoever reaches a Ray's ports can run code in it. So these are on the loopback interface, and ask for a token that
    only its processes know, as other users of the machine reach that interface, too.

    Args:
        threads: for each copy of the base; Ray would let each compute on one.
        environment: what to change.
    """
    prepare(environment)
    environment[LOOPBACK] = "1"
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # by which Ray takes 127.0.0.1 for this machine's address
    environment["RAY_AUTH_MODE"] = "token"
    environment["RAY_AUTH_TOKEN"] = _TOKEN
    environment.setdefault("OMP_NUM_THREADS", str(threads))


def keep_to_loopback() -> None:
    """In a process of Ray Serve that runs our code, let its own port be on the loopback interface, if all are to be.

    Each such process opens a port to which others of the cluster may send pickled calls. It opens it on all interfaces,
    asks for no token, and has no setting for either.
    """
    if not os.environ.get(LOOPBACK):
        return
    from ray.serve._private import replica

    open_port = getattr(replica, "add_port_to_grpc_server", None)
    if open_port is not None:
        replica.add_port_to_grpc_server = lambda server, address: open_port(
            server, address.replace("[::]", "127.0.0.1")
        )


def check_loopback(endpoint: int) -> None:
    """Raise `KronAError` if a process below this one can be reached from other machines, but for the endpoint's port.

    Which ports Ray opens, and where, changes from one version to the next.
    """
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for found in process.net_connections(kind="tcp"):
                if (
                    found.status == psutil.CONN_LISTEN
                    and found.laddr.port != endpoint
                    and not _is_local(found.laddr.ip)
                ):
                    raise KronAError(
                        f"Ray's {process.name()} can be reached from other machines, at {found.laddr.ip}, port "
                        f"{found.laddr.port}, which lets them run code here. Use the version of Ray that is known to "
                        "work, in constraints.txt, or start a cluster of your own behind a firewall and give its "
                        "address with --ray."
                    )


def _is_local(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def check_installed() -> None:
    """Raise `KronAError` unless the extra `serve` is installed."""
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise KronAError(
            f"Serving needs Ray Serve, which is not installed: pip install 'diffusekrona[serve]' ({error})."
        ) from error
