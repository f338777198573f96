"""The scales that PEFT's configs in a header give."""

import json
import re
from typing import Any

import pytest

from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats.scales import HEADER, Scales, from_header


def scales(**fields: Any) -> Scales:
    return from_header({"format": "pt", HEADER: json.dumps(fields)}, "dog.safetensors")


def test_lora_and_the_other_methods_call_alpha_differently() -> None:
    assert scales(r=4, lora_alpha=2).of("x", None) == 0.5
    assert scales(r=4, alpha=2).of("x", None) == 0.5


def test_a_pipelines_components_have_their_own() -> None:
    both = scales(**{"unet.r": 4, "unet.lora_alpha": 2, "text_encoder_2.r": 4, "text_encoder_2.lora_alpha": 12})
    assert both.of("unet.mid.to_q", 4) == 0.5
    assert both.of("text_encoder_2.text_model.q_proj", 4) == 3.0
    assert both.of("text_encoder.text_model.q_proj", 4) == 1.0


def test_patterns_come_first_and_match_as_in_peft() -> None:
    found = scales(r=4, lora_alpha=2, alpha_pattern={"to_q": 8, r"mid\.\d+": 3}, rank_pattern={"^up.to_q": 16})
    assert found.of("base_model.model.down.to_q", None) == 2.0
    assert found.of("down.mid.11", None) == 0.75
    assert found.of("up.to_q", None) == found.of("base_model.model.up.to_q", None) == 0.5
    assert found.of("down.to_qq", None) == 0.5


def test_the_tensors_rank_counts_more_than_the_configs() -> None:
    assert scales(r=4, lora_alpha=2).of("x", 8) == 0.25


def test_rslora_divides_by_the_root() -> None:
    assert scales(r=16, lora_alpha=2, use_rslora=True).of("x", 16) == 0.5


def test_a_config_without_alpha_says_nothing() -> None:
    assert scales(r=4).of("x", 4) == 1.0


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "[" * 100000])
def test_a_damaged_header_is_named(text: str) -> None:
    with pytest.raises(AdapterFileError, match=r"dog\.safetensors has a damaged `lora_adapter_metadata`"):
        from_header({HEADER: text}, "dog.safetensors")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0, "alpha": 2}, "alpha 2 and rank 0"),
        ({"r": -4, "alpha": 2, "use_rslora": True}, "rank -4"),
        ({"alpha": 2}, "rank None"),
        ({"r": 4, "alpha": "two"}, "alpha 'two'"),
        ({"r": 4, "alpha": [2]}, re.escape("alpha [2]")),
        ({"r": 4, "alpha": float("inf")}, "alpha inf"),
        ({"r": 4, "alpha": 10**400}, "alpha 1000"),
        ({"r": 4, "alpha": 2, "alpha_pattern": ["x"]}, "alpha_pattern does not work"),
        ({"r": 4, "alpha": 2, "alpha_pattern": {"(": 1}}, "alpha_pattern does not work"),
    ],
)
def test_a_config_that_gives_no_scale_is_named(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(AdapterFileError, match=text) as error:
        scales(**fields).of("x", None)
    assert str(error.value).startswith("dog.safetensors has a config")
