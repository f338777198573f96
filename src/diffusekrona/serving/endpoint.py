"""OpenAI's images API: what a request may say, and the answers.

Each part of a request is used, or refused with the reason; none is ignored but those that name the client's own
user.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import time
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .picture import Picture, Refusal, Refused
from .settings import ServeSettings

SIDE_UNIT = 16
"""Pixels that a side is a multiple of, which suits every family's latents."""

SHORTEST_SIDE = 64

_MOST_GUIDANCE = 100.0
_LARGEST_SEED = 2**63 - 1


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`; `seed` and what follows are ours."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    output_format: str | None = None
    output_compression: int | None = None
    partial_images: int | None = None
    stream: bool | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    negative_prompt: str | None = None


_ONLY: dict[str, tuple[set[Any], str]] = {
    "response_format": ({"b64_json"}, "This server sends pictures as b64_json, and keeps none for a url."),
    "quality": ({"auto", "standard"}, "Qualities are not offered; say num_inference_steps instead."),
    "style": (set(), "Styles are not offered; say it in the prompt, or choose another model."),
    "background": ({"auto", "opaque"}, "Pictures have no transparent background here."),
    "moderation": ({"auto"}, "This server does not moderate."),
    "output_format": ({"png"}, "Pictures are sent as png."),
    "output_compression": ({100}, "Pictures are sent as png, which loses nothing."),
    "partial_images": ({0}, "Pictures are sent when they are whole."),
    "stream": ({False}, "Pictures are sent when all are done."),
}
"""What OpenAI's API has and we do not do: the values that ask for what we do anyway, and what else is answered."""


def asked_pictures(body: bytes, settings: ServeSettings) -> list[Picture]:
    """The pictures that a request asks for.

    Raises:
        Refused: with the code 400 and the reason.
    """
    try:
        request = ImagesRequest.model_validate(_parsed(body))
    except ValidationError as error:
        raise _refused(error) from error
    for name, (allowed, reason) in _ONLY.items():
        value = getattr(request, name)
        if value is not None and value not in allowed:
            raise bad(f"{name} is {_short(value)}. {reason}", name)
    _check_texts(request, settings)
    count = _within("n", 1 if request.n is None else request.n, 1, settings.max_images)
    steps = settings.steps if request.num_inference_steps is None else request.num_inference_steps
    _within("num_inference_steps", steps, 1, max(settings.max_steps, settings.steps))
    guidance = settings.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if guidance is not None:
        _within("guidance_scale", guidance, 0, _MOST_GUIDANCE)
    width, height = _size(request.size, settings.max_side)
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    _within("seed", seed, 0, _LARGEST_SEED)
    return [
        Picture(
            request.model or None,
            request.prompt,
            (seed + number) % (_LARGEST_SEED + 1),
            request.negative_prompt,
            width,
            height,
            steps,
            guidance,
        )
        for number in range(count)
    ]


def bad(message: str, param: str | None = None, code: str | None = None) -> Refused:
    """A request that is wrong."""
    return Refused(400, message, param, code)


def unknown_model(name: str) -> Refused:
    """There is no such adapter."""
    return Refused(
        404, f"There is no model {_short(name)}; GET /v1/models lists those that there are.", "model", "model_not_found"
    )


def error_body(refusal: Refusal) -> dict[str, Any]:
    """An error as OpenAI's API tells it."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    kind = "rate_limit_error" if refusal.status == 429 else kind
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def images_body(pngs: Iterable[bytes]) -> dict[str, Any]:
    """Pictures as OpenAI's API sends them."""
    return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(png).decode()} for png in pngs]}


def models_body(names: Iterable[str], started: int) -> dict[str, Any]:
    """Adapters as OpenAI's API lists its models."""
    listed = [{"id": name, "object": "model", "created": started, "owned_by": "diffusekrona"} for name in names]
    return {"object": "list", "data": listed}


def json_bytes(body: dict[str, Any]) -> bytes:
    """An answer in ASCII, so that whatever is repeated of a request can be sent."""
    return json.dumps(body).encode("ascii")


def _parsed(body: bytes) -> Any:
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise bad("The body is not JSON.") from error
    if not isinstance(found, dict):
        raise bad("The body must be a JSON object.")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _refused(error: ValidationError) -> Refused:
    """The first thing that is wrong with a request's parts."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        return bad(f"There is no parameter {_short(name)}.", _short(name), "unknown_parameter")
    if problem["type"] == "missing":
        return bad(f"{name} is missing.", name, "missing_required_parameter")
    return bad(f"{name}: {problem['msg']}.", name)


def _check_texts(request: ImagesRequest, settings: ServeSettings) -> None:
    for name, most in (
        ("prompt", settings.max_prompt),
        ("negative_prompt", settings.max_prompt),
        ("model", 256),
        ("user", 256),
        ("safety_identifier", 256),
    ):
        text = getattr(request, name)
        if text is None:
            continue
        if len(text) > most:
            raise bad(f"{name} has {len(text):,} characters, and {most:,} is the most.", name)
        if any("\ud800" <= sign <= "\udfff" or sign == "\0" for sign in text):
            raise bad(f"{name} holds what is no text.", name)
    if not request.prompt.strip():
        raise bad("prompt is empty.", "prompt")


def _within(name: str, value: Any, least: float, most: float) -> Any:
    if not least <= value <= most:
        raise bad(f"{name} must be from {least:g} to {most:,.0f}, not {_short(value)}.", name)
    return value


def _size(text: str | None, most: int) -> tuple[int | None, int | None]:
    """Width and height; None for the base's own."""
    if text is None or text == "auto":
        return None, None
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if found is None:
        raise bad(f"size must be auto, or such as 1024x1024, not {_short(text)}.", "size")
    width, height = int(found[1]), int(found[2])
    for side in (width, height):
        if side % SIDE_UNIT or not SHORTEST_SIDE <= side <= most:
            raise bad(
                f"size must have sides from {SHORTEST_SIDE} to {most} that are multiples of {SIDE_UNIT}, "
                f"not {_short(text)}.",
                "size",
            )
    return width, height


def _short(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 80 else f"{text[:80]}…")
