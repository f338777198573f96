"""What a request may say: each part is used, or refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.image_generate_params import ImageGenerateParamsBase

from diffusekrona.serving.endpoint import ImagesRequest, asked_pictures, error_body, json_bytes, models_body
from diffusekrona.serving.picture import Picture, Refusal, Refused
from tests.serving.asking import settings


def pictures(settings_of: dict[str, Any] | None = None, **body: Any) -> list[Picture]:
    return asked_pictures(json.dumps({"prompt": "a dog", **body}).encode(), settings(**(settings_of or {})))


def refused(settings_of: dict[str, Any] | None = None, **body: Any) -> Refusal:
    with pytest.raises(Refused) as caught:
        pictures(settings_of, **body)
    return caught.value.refusal


def test_what_is_asked_for_is_in_the_pictures() -> None:
    found = pictures(
        model="dog", n=2, size="512x768", seed=7, guidance_scale=3, num_inference_steps=12, negative_prompt="fog"
    )
    expected = {"negative_prompt": "fog", "width": 512, "height": 768, "steps": 12, "guidance_scale": 3}
    assert found == [Picture("dog", "a dog", seed, **expected) for seed in (7, 8)]


def test_what_is_not_said_is_the_servers() -> None:
    (found,) = pictures({"steps": 9, "guidance_scale": 2.5})
    assert (found.model, found.width, found.height, found.steps, found.guidance_scale) == (None, None, None, 9, 2.5)
    assert found.seed != pictures()[0].seed
    assert pictures(model="")[0].model is None


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": "b64_json", "quality": "standard", "background": "opaque", "moderation": "auto"},
        {"quality": "auto", "output_format": "png", "output_compression": 100, "partial_images": 0, "stream": False},
        {"user": "someone", "size": "auto", "n": None, "style": None, "seed": 0, "guidance_scale": 0},
    ],
    ids=str,
)
def test_what_asks_for_what_is_done_anyway_is_taken(body: dict[str, Any]) -> None:
    assert len(pictures(**body)) == 1


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"response_format": "url"}, "response_format", "'url'. This server sends pictures as b64_json"),
        ({"quality": "hd"}, "quality", "say num_inference_steps"),
        ({"style": "vivid"}, "style", "not offered"),
        ({"background": "transparent"}, "background", "no transparent background"),
        ({"moderation": "low"}, "moderation", "does not moderate"),
        ({"output_format": "webp"}, "output_format", "sent as png"),
        ({"output_compression": 50}, "output_compression", "sent as png"),
        ({"partial_images": 2}, "partial_images", "when they are whole"),
        ({"stream": True}, "stream", "when all are done"),
        ({"n": 5}, "n", "n must be from 1 to 4, not '5'"),
        ({"n": 0}, "n", "from 1"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": "  "}, "prompt", "prompt is empty"),
        ({"prompt": "a" * 2001}, "prompt", "prompt has 2,001 characters, and 2,000 is the most"),
        ({"negative_prompt": "a" * 2001}, "negative_prompt", "2,000 is the most"),
        ({"prompt": "\ud800"}, "prompt", "no text"),
        ({"model": "dog\0"}, "model", "no text"),
        ({"model": "d" * 257}, "model", "256 is the most"),
        ({"size": "1024"}, "size", "such as 1024x1024"),
        ({"size": "10000x64"}, "size", "from 64 to 1536"),
        ({"size": "48x64"}, "size", "from 64"),
        ({"size": "100x64"}, "size", "multiples of 16"),
        ({"size": "６４x64"}, "size", "such as"),
        ({"num_inference_steps": 101}, "num_inference_steps", "from 1 to 100"),
        ({"guidance_scale": 1e9}, "guidance_scale", "from 0 to 100"),
        ({"guidance_scale": "7"}, "guidance_scale", "valid number"),
        ({"seed": -1}, "seed", "from 0"),
        ({"seed": 2**63}, "seed", "from 0"),
        ({"sampler": "ddim"}, "'sampler'", "no parameter 'sampler'"),
    ],
    ids=str,
)
def test_all_else_is_refused_with_its_name_and_the_reason(body: dict[str, Any], param: str, text: str) -> None:
    found = refused(**body)
    assert (found.status, found.param) == (400, param)
    assert text in found.message


def test_a_prompt_is_needed() -> None:
    with pytest.raises(Refused, match="prompt is missing"):
        asked_pictures(b"{}", settings())


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"\xff", b"{", b"[" * 60_000, b'{"prompt": NaN}', b'{"seed": 1' + b"1" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refused, match=r"The body (is not JSON|must be a JSON object)"):
        asked_pictures(body, settings())


def test_no_part_of_openais_request_is_ignored() -> None:
    theirs = set(ImageGenerateParamsBase.__annotations__)
    ours = set(ImagesRequest.model_fields)
    assert {
        "prompt",
        "model",
        "n",
        "size",
        "quality",
        "response_format",
        "style",
        "user",
        "background",
    } <= theirs & ours
    for name in theirs - ours:
        assert refused(**{name: 1}).code == "unknown_parameter"


def test_answers_are_as_openai_writes_them() -> None:
    assert error_body(Refusal(429, "Later.", code="queue_full")) == {
        "error": {"message": "Later.", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
    assert error_body(Refusal(503, "No."))["error"]["type"] == "server_error"
    assert json_bytes({"\ud800": "\ud800"}) == b'{"\\ud800": "\\ud800"}'
    assert models_body(["dog"], 5)["data"] == [
        {"id": "dog", "object": "model", "created": 5, "owned_by": "diffusekrona"}
    ]
