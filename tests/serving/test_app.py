"""The endpoint without a server: addresses, token, limits, who goes away; and 10,000 requests made to do harm."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from typing import Any

import pytest

from diffusekrona.serving import app as app_module
from diffusekrona.serving.app import make_app
from diffusekrona.serving.gather import Outcome
from diffusekrona.serving.picture import Picture, Refusal
from tests.serving.asking import GENERATIONS, JSON, Artists, answer, asked, settings


def test_pictures_come_in_the_order_of_their_seeds() -> None:
    artists = Artists("dog")
    found = answer({"prompt": "a dog", "model": "dog", "n": 3, "seed": 5}, artists=artists)
    assert found.status == 200
    assert [base64.b64decode(one["b64_json"]) for one in found.body["data"]] == [b"\5", b"\6", b"\7"]
    assert {picture.model for picture in artists.pictures} == {"dog"}


def test_models_and_health() -> None:
    assert [one["id"] for one in answer(None, "/v1/models").body["data"]] == ["dog", "cat"]
    assert answer(None, "/v1/models/dog").body["id"] == "dog"
    assert answer(None, "/v1/models/cow").status == 404
    assert answer(None, "/v1/models/../../etc/passwd").body["error"]["code"] == "model_not_found"
    assert answer(None, "/health").body == {"status": "ok"}


def test_health_before_the_base_is_there() -> None:
    artists = Artists()

    async def not_yet() -> bool:
        return False

    artists.ready = not_yet  # type: ignore[method-assign]
    assert answer(None, "/health", artists=artists).status == 503


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/", "GET", 404), (GENERATIONS, "GET", 405), ("/v1/models", "POST", 405), ("/v1/images/edits", "POST", 404)],
)
def test_other_addresses_and_methods(path: str, method: str, status: int) -> None:
    found = answer(b"{}", path, method=method)
    assert found.status == status
    assert found.body["error"]["type"] == "invalid_request_error"


def test_no_such_model() -> None:
    found = answer({"prompt": "a dog", "model": "../dog"})
    assert (found.status, found.body["error"]["code"]) == (404, "model_not_found")


# The token


@pytest.mark.parametrize("path", [GENERATIONS, "/v1/models", "/v1/models/dog"])
@pytest.mark.parametrize(
    "given", [None, b"", b"Bearer", b"Bearer wrong", b"bearer secret", b"secret", b"Bearer s\xc3\xa9"]
)
def test_without_the_token_nothing_is_told(path: str, given: bytes | None) -> None:
    headers = [JSON, *([] if given is None else [(b"authorization", given)])]
    body = {"prompt": "a dog"} if path == GENERATIONS else None
    artists = Artists("dog")
    found = answer(body, path, headers=headers, token="secret", artists=artists)
    assert (found.status, found.body["error"]["code"]) == (401, "invalid_api_key")
    assert found.headers["www-authenticate"] == "Bearer"
    assert artists.pictures == []


def test_with_the_token_all_is_as_without_one() -> None:
    headers = [JSON, (b"authorization", b"Bearer secret")]
    assert answer({"prompt": "a dog"}, headers=headers, token="secret").status == 200
    assert answer(None, "/health", token="secret").status == 200


def test_it_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(app_module.hmac, "compare_digest", lambda one, two: compared.append((one, two)))
    assert answer({"prompt": "a dog"}, token="secret").status == 401
    assert compared == [(b"", b"Bearer secret")]


# Limits


@pytest.mark.parametrize(
    "headers", [[JSON], [JSON, (b"content-length", b"301")], [JSON, (b"content-length", b"9" * 99)]]
)
def test_a_body_that_is_too_large_is_not_read(headers: list[tuple[bytes, bytes]]) -> None:
    found = answer(b" " * 301, headers=headers, parts=10, max_body=300)
    assert (found.status, found.message) == (413, "The body may have 300 bytes.")


def test_a_body_that_comes_too_slowly_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.05)

    async def slow() -> Any:
        await asyncio.sleep(60)

    async def ask() -> Any:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": GENERATIONS, "headers": [JSON], "query_string": b""}
        await make_app(Artists(), settings())(scope, slow, send)
        return sent[0]["status"]

    assert asyncio.run(asyncio.wait_for(ask(), 20)) == 408


@pytest.mark.parametrize("kind", [b"text/plain", b"multipart/form-data", b"application/jsonp", b""])
def test_only_json_is_taken_which_pages_of_other_sites_cannot_send(kind: bytes) -> None:
    assert answer(b"{}", headers=[(b"content-type", kind)]).status == 415


# Who goes away


def test_who_goes_away_has_nothing_drawn() -> None:
    artists = Artists()

    async def leave() -> None:
        asking = asyncio.ensure_future(asked(make_app(artists, settings()), GENERATIONS, {"prompt": "slow", "n": 3}))
        while len(artists.pictures) < 3:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0.05)
        assert artists.cancelled == 3

    asyncio.run(leave())


def test_one_picture_that_fails_ends_the_others_of_its_request() -> None:
    class Half(Artists):
        async def draw(self, picture: Picture) -> Outcome:
            if picture.seed == 1:
                return Refusal(429, "Later.", code="queue_full")
            return await super().draw(picture)

    artists = Half()

    async def ask() -> Any:
        found = await asked(make_app(artists, settings()), GENERATIONS, {"prompt": "slow", "n": 3, "seed": 0})
        await asyncio.sleep(0.05)
        assert artists.cancelled == 2  # and not only with the loop's end
        return found

    found = asyncio.run(ask())
    assert (found.status, found.body["error"]["type"]) == (429, "rate_limit_error")


# Harm


def damaged(chance: random.Random) -> tuple[str, str, bytes, list[tuple[bytes, bytes]]]:
    """A request with something wrong, or strange: path, method, body, headers."""
    values: list[Any] = [
        None, True, -1, 0, 10**400, 1e308, 0.5, "", "a dog", "\ud800", "\0", "é" * 3000, "../../etc/passwd", [], {},
        [[[]]], {"a": {"b": 1}}, "64x64", "b64_json", "url", "__class__", "%s%n", "' OR 1=1", "<script>", "\u202e",
    ]  # fmt: skip
    names = ["prompt", "model", "n", "size", "seed", "user", "guidance_scale", "num_inference_steps", "stream"]
    names += ["response_format", "__proto__", "", "é", "negative_prompt", "quality", "\ud800"]
    body: Any = {chance.choice(names): chance.choice(values) for _ in range(chance.randrange(5))}
    if chance.random() < 0.5:
        body.setdefault("prompt", "a dog")
    text = json.dumps(body).encode()
    kind = chance.randrange(6)
    if kind == 0:
        text = chance.randbytes(chance.randrange(60))
    elif kind == 1 and text:
        place = chance.randrange(len(text))
        text = text[:place] + chance.randbytes(1) + text[place + 1 :]
    elif kind == 2:
        text = text[: chance.randrange(len(text) + 1)]
    elif kind == 3:
        text = chance.choice([b"[" * 9000, b'{"a":' * 9000, b"9" * 9000, b'"' + b"\\u0000" * 999 + b'"', b"\x80\x04."])
    path = chance.choice(
        [GENERATIONS] * 8 + ["/v1/models/" + chance.choice(["é", "..%2f", "%00", "a" * 999]), "//", "/x"]
    )
    method = chance.choice(["POST"] * 8 + ["GET", "DELETE", "BREW"])
    types = [b"application/json"] * 8 + [b"", b"application/json; charset=utf-7", b"\xff\xfe"]
    headers = [(b"content-type", chance.choice(types))]
    if chance.random() < 0.2:
        headers.append((b"authorization", chance.choice([b"Bearer x", chance.randbytes(9), b"Basic Og=="])))
    if chance.random() < 0.1:
        headers.append((b"content-length", chance.choice([b"-1", b"x", b"1e9", b"\xb2", b"99999999999", b"0"])))
    return path, method, text, headers


def test_ten_thousand_malformed_requests_are_each_answered() -> None:
    chance, counts = random.Random(0), dict[int, int]()

    async def ask_all() -> None:
        plain, guarded = (make_app(Artists("dog"), settings(token=token)) for token in (None, "secret"))
        for number in range(10_000):
            path, method, body, headers = damaged(chance)
            app = guarded if number % 10 == 0 else plain
            found = await asked(app, path, body, method=method, headers=headers, parts=chance.randrange(1, 4))
            assert found.status < 500, (path, method, body, headers)
            assert found.status == 200 or found.message
            counts[found.status] = counts.get(found.status, 0) + 1

    asyncio.run(ask_all())
    assert sum(counts.values()) == 10_000
    assert {200, 400, 401, 404, 405, 413, 415} <= set(counts)
    assert counts[400] > 2000
