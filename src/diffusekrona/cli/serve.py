"""`diffusekrona serve`."""

from __future__ import annotations

from typing import Any

from ..serving.settings import ServeSettings
from .console import print_line
from .options import flags_of, with_flags


@with_flags(flags_of(ServeSettings))
def serve(**given: Any) -> None:
    """Serve adapters on one base as OpenAI's images API, each picture of a batch with its own adapter."""
    from ..serving.server import serve as serve_until_stopped

    settings = ServeSettings(**given).with_token()

    def ready(address: str) -> None:
        print_line(f"Ready: {address}/v1" + (" (with a token)" if settings.token else ""))

    serve_until_stopped(settings, ready)
