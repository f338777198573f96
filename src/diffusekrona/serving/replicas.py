"""The processes of a server, as Ray Serve runs them: one that answers, and copies of the base that draw."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.util.metrics import Counter, Gauge, Histogram
from starlette.requests import Request
from starlette.responses import Response

from .app import make_app
from .environment import keep_to_loopback
from .gather import Gatherer, Outcome
from .picture import Picture, Refusal
from .settings import ServeSettings

TRIES = 3
"""How often a picture is begun whose copy of the base died."""

_PAUSE = 0.5
"""Seconds until the next try."""

keep_to_loopback()  # while Ray reads what it is to run, before it opens a port

_GRACE = 30.0
"""Seconds beyond a request's own, after which the one who answers gives a copy up that does not answer."""


class Painter:
    """A copy of the base with its adapters, which draws what comes in batches.

    Args:
        values: the settings.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        from .drawing import Drawer
        from .loaded import load_pipeline
        from .store import AdapterStore

        self._settings = settings = ServeSettings(**values)
        pipe = load_pipeline(settings)
        self._store = AdapterStore(pipe, settings.source, settings.adapter_memory << 20)
        self._drawer = Drawer(pipe, self._store)
        self._metrics = _Metrics()
        self._gatherer = Gatherer(
            self._draw, size=settings.batch_size, wait=settings.wait, most=settings.queue, ahead=self._drawer.ahead
        )

    async def draw(self, picture: Picture) -> Outcome:
        """A picture as PNG, or why there is none."""
        outcome: Outcome | None = self._drawer.refusal(picture)
        if outcome is None:
            kind = self._drawer.kind(picture)
            outcome = await self._gatherer.drawn(picture, kind, self._settings.timeout)
        self._metrics.tell(outcome, self._gatherer.waiting, self._store.bytes)
        return outcome

    async def names(self) -> list[str]:
        """The adapters that there are."""
        return self._store.names()

    async def ready(self) -> bool:
        """True, once the base is loaded."""
        return True

    def _draw(self, pictures: Sequence[Picture], abandoned: Any) -> Sequence[Outcome]:
        self._metrics.batch(len(pictures))
        return self._drawer.draw(pictures, abandoned)


class _Metrics:
    """What Ray tells Prometheus of a copy, beside its own numbers."""

    def __init__(self) -> None:
        sizes = [1, 2, 4, 8, 16, 32]
        self._done = Counter("diffusekrona_pictures", "Pictures asked for, by the answer's code.", ("status",))
        self._sizes = Histogram("diffusekrona_batch_size", "Pictures of a batch.", sizes)
        self._waiting = Gauge("diffusekrona_waiting", "Pictures that wait.")
        self._bytes = Gauge("diffusekrona_adapter_bytes", "Bytes of factors in memory.")

    def tell(self, outcome: Outcome, waiting: int, held: int) -> None:
        status = outcome.status if isinstance(outcome, Refusal) else 200
        self._done.inc(tags={"status": str(status)})
        self._waiting.set(waiting)
        self._bytes.set(held)

    def batch(self, size: int) -> None:
        self._sizes.observe(size)


class Endpoint:
    """Answers HTTP, and has copies of the base draw.

    Args:
        painter: their handle.
        values: the settings.
    """

    def __init__(self, painter: Any, values: Mapping[str, Any]) -> None:
        settings = ServeSettings(**values)
        self._app = make_app(_Remote(painter, settings.timeout + _GRACE), settings)

    async def __call__(self, request: Request) -> Response:
        """The answer to a request."""
        return await _answer(self._app, request)


class _Remote:
    """The copies of the base, as the app's artist."""

    def __init__(self, painter: Any, timeout: float) -> None:
        self._painter, self._timeout = painter, timeout

    async def draw(self, picture: Picture) -> Outcome:
        try:
            return await asyncio.wait_for(self._tried(picture), self._timeout)
        except asyncio.TimeoutError:
            return Refusal(504, "The picture was not done in time.", code="timeout")

    async def _tried(self, picture: Picture) -> Outcome:
        for _ in range(TRIES):
            try:
                outcome: Outcome = await _awaited(self._painter.draw.remote(picture))
                return outcome
            except BackPressureError:
                return Refusal(429, "Too many pictures wait already; try again later.", code="queue_full")
            except (RayActorError, DeploymentUnavailableError):
                await asyncio.sleep(_PAUSE)  # its process died: another copy, or its successor, begins anew
        return Refusal(503, "What draws pictures stopped, and did so again; try again later.", code="unavailable")

    async def names(self) -> Sequence[str]:
        names: Sequence[str] = await _awaited(self._painter.names.remote())
        return names

    async def ready(self) -> bool:
        try:
            return bool(await asyncio.wait_for(_awaited(self._painter.ready.remote()), 5))
        except Exception:
            return False


async def _awaited(response: Any) -> Any:
    """What a copy answers; it is told where nobody waits for that any more."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _answer(app: Any, request: Request) -> Response:
    """An ASGI app's answer, in one piece."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app(request.scope, request.receive, send)
    response = Response(b"".join(message.get("body", b"") for message in sent[1:]), sent[0]["status"])
    response.raw_headers = list(sent[0]["headers"])
    return response


def application(settings: ServeSettings, gpus: float, kind: type[Any] = Painter) -> Any:
    """The server, as `serve.run` takes it; `kind` draws, with the methods of a `Painter`."""
    values = dict(settings)
    waiting = settings.queue + 2 * settings.batch_size
    painter = serve.deployment(kind).options(
        name="painter",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": 0 if gpus else 1, "num_gpus": gpus},
        max_ongoing_requests=waiting + 16,  # so that it is the gatherer that refuses
        max_queued_requests=waiting * settings.replicas,
        health_check_period_s=2,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=5,
    )
    endpoint = serve.deployment(Endpoint).options(
        name="endpoint",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=5,
    )
    return endpoint.bind(painter.bind(values), values)
