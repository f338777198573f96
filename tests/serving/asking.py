"""What asks an ASGI app, without a server: a request and its answer; and artists that draw nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusekrona.serving.app import make_app
from diffusekrona.serving.gather import Outcome
from diffusekrona.serving.picture import Picture, Refusal
from diffusekrona.serving.settings import ServeSettings

GENERATIONS = "/v1/images/generations"
JSON = (b"content-type", b"application/json")


class Answer(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]

    @property
    def message(self) -> str:
        text: str = self.body["error"]["message"]
        return text


def settings(**values: Any) -> ServeSettings:
    return ServeSettings(**{"base": "base", "adapters": ["adapters"], **values})


async def asked(
    app: Any,
    path: str,
    body: bytes | dict[str, Any] | None = None,
    *,
    method: str | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (JSON,),
    parts: int = 1,
) -> Answer:
    """An app's answer to a request, whose body comes in so many parts."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body or b""
    step = max(1, -(-len(content) // parts))
    messages: list[Any] = [
        {"type": "http.request", "body": content[start : start + step], "more_body": True}
        for start in range(0, len(content), step)
    ]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method or ("GET" if body is None else "POST"),
        "path": path,
        "raw_path": path.encode("utf-8", "replace"),
        "query_string": b"",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
        "root_path": "",
    }
    await app(scope, receive, send)
    text = b"".join(message.get("body", b"") for message in sent[1:])
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], json.loads(text), found)


class Artists:
    """Notes what is to be drawn, and answers with a byte for each picture."""

    def __init__(self, *names: str) -> None:
        self.listed, self.pictures, self.cancelled = list(names), list[Picture](), 0

    async def draw(self, picture: Picture) -> Outcome:
        self.pictures.append(picture)
        if picture.model is not None and picture.model not in self.listed:
            return Refusal(404, "There is no such model.", "model", "model_not_found")
        if picture.prompt == "slow":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return bytes([picture.seed % 256])

    async def names(self) -> list[str]:
        return self.listed

    async def ready(self) -> bool:
        return True


def answer(body: bytes | dict[str, Any] | None, path: str = GENERATIONS, *, artists: Any = None, **more: Any) -> Answer:
    """The answer of an app of its own to one request."""
    known = {name: more.pop(name) for name in ("method", "headers", "parts") if name in more}
    app = make_app(artists or Artists("dog", "cat"), settings(**more))
    return asyncio.run(asked(app, path, body, **known))
