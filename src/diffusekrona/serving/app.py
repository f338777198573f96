"""The ASGI app: OpenAI's images API over whatever draws."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .endpoint import asked_pictures, bad, error_body, images_body, json_bytes, models_body, unknown_model
from .gather import Outcome
from .picture import Picture, Refusal, Refused
from .settings import ServeSettings

BODY_SECONDS = 30.0
"""How long a client may take to send a request's body."""


class Artist(Protocol):
    """What draws, wherever it is."""

    async def draw(self, picture: Picture) -> Outcome:
        """A picture as PNG, or why there is none."""

    async def names(self) -> Sequence[str]:
        """The adapters that there are."""

    async def ready(self) -> bool:
        """Whether pictures can be drawn."""


def make_app(artist: Artist, settings: ServeSettings) -> Starlette:
    """The endpoint, with its checks and limits."""
    endpoint = _Endpoint(artist, settings)
    return Starlette(
        routes=[
            Route("/v1/images/generations", endpoint.generate, methods=["POST"]),
            Route("/v1/models", endpoint.models, methods=["GET"]),
            Route("/v1/models/{name:path}", endpoint.model, methods=["GET"]),
            Route("/health", endpoint.health, methods=["GET"]),
        ],
        exception_handlers={Refused: _refused, HTTPException: _http_error},
    )


class _Endpoint:
    def __init__(self, artist: Artist, settings: ServeSettings) -> None:
        self._artist, self._settings, self._started = artist, settings, int(time.time())

    async def generate(self, request: Request) -> Response:
        self._check_token(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Which a page of another site cannot send without asking first.
            raise Refused(415, "The content type must be application/json.")
        pictures = asked_pictures(await self._body(request), self._settings)
        outcomes = await _all(self._artist, pictures)
        for outcome in outcomes:
            if isinstance(outcome, Refusal):
                return _answer(error_body(outcome), outcome.status)
        return _answer(images_body(outcome for outcome in outcomes if isinstance(outcome, bytes)))

    async def models(self, request: Request) -> Response:
        self._check_token(request)
        return _answer(models_body(await self._artist.names(), self._started))

    async def model(self, request: Request) -> Response:
        self._check_token(request)
        name = request.path_params["name"]
        if name not in await self._artist.names():
            raise unknown_model(name)
        return _answer(models_body([name], self._started)["data"][0])

    async def health(self, request: Request) -> Response:
        ready = await self._artist.ready()
        return _answer({"status": "ok" if ready else "starting"}, 200 if ready else 503)

    def _check_token(self, request: Request) -> None:
        token = self._settings.token
        if token is None:
            return
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Refused(401, "The token is missing or wrong: send it as an API key.", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        try:
            return await asyncio.wait_for(_read(request, self._settings.max_body), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refused(408, f"The body did not come within {BODY_SECONDS:g} seconds.") from None
        except ClientDisconnect:
            raise bad("The client went away.") from None


async def _read(request: Request, most: int) -> bytes:
    told = request.headers.get("content-length", "0")
    too_large = Refused(413, f"The body may have {most:,} bytes.")
    if told.isdecimal() and int(told[:20]) > most:
        raise too_large
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    return body


async def _all(artist: Artist, pictures: Sequence[Picture]) -> list[Outcome]:
    """Draw all pictures of a request; the first that fails, or the client who goes, ends the others."""
    tasks = [asyncio.ensure_future(artist.draw(picture)) for picture in pictures]
    try:
        for task in asyncio.as_completed(tasks):
            if isinstance(outcome := await task, Refusal):
                return [outcome]
        return [task.result() for task in tasks]
    finally:
        for unfinished in tasks:
            unfinished.cancel()


def _answer(body: dict[str, Any], status: int = 200) -> Response:
    return Response(json_bytes(body), status, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    response = _answer(error_body(error.refusal), error.refusal.status)
    if error.refusal.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: "There is nothing at this address.", 405: "This address takes another method."}
    refusal = Refusal(error.status_code, text.get(error.status_code, str(error.detail)))
    return Response(
        json_bytes(error_body(refusal)), error.status_code, dict(error.headers or {}), media_type="application/json"
    )
