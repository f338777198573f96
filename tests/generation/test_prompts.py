"""Prompts beyond CLIP's 77 tokens."""

import pytest
import torch

from diffusekrona.generation import generate_images
from diffusekrona.generation.prompts import chunks_needed, encode_in_chunks
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline

CPU = torch.device("cpu")
EACH = pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline])
LONG = "a sks toy on a table of wood, and beside it a cup of tea with a spoon of silver, early in the morning "
"""Each letter is a token here, so that these are two chunks."""


def theirs(pipe, prompt):
    said = pipe.encode_prompt(prompt=prompt, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return said[0], said[2] if len(said) > 2 else None


@EACH
@torch.no_grad()
def test_one_chunk_is_what_the_pipeline_makes_of_a_prompt_that_fits(build):
    pipe = build()
    found = encode_in_chunks(pipe, ["a sks toy", ""], 1, CPU)
    for row, prompt in enumerate(["a sks toy", ""]):
        hidden, pooled = theirs(pipe, prompt)
        torch.testing.assert_close(found.hidden[[row]], hidden, atol=1e-5, rtol=0)
        if pooled is not None:
            torch.testing.assert_close(found.pooled[[row]], pooled, atol=1e-5, rtol=0)


@EACH
@torch.no_grad()
def test_each_chunk_is_encoded_like_a_prompt_of_its_own(build):
    pipe = build()
    first, second = "a" * 75, "b" * 20
    assert chunks_needed(pipe, [first + second, "a"]) == 2
    assert chunks_needed(pipe, [first]) == 1
    found = encode_in_chunks(pipe, [first + second], 2, CPU)
    hidden, pooled = theirs(pipe, "b" * 20)
    torch.testing.assert_close(found.hidden[:, 77:], hidden, atol=1e-5, rtol=0)
    if pooled is not None:
        head = encode_in_chunks(pipe, [first], 1, CPU).pooled
        assert found.pooled.shape == head.shape == pooled.shape


@EACH
def test_what_stands_at_the_end_of_a_long_prompt_is_drawn(build):
    pipe = build()
    assert chunks_needed(pipe, [LONG]) == 2
    options = {"steps": 2, "height": 32, "width": 32}
    night, day = generate_images(pipe, [LONG + "at night", LONG + "in the sun"], 0, **options)
    assert night.tobytes() != day.tobytes()
    (alone,) = generate_images(pipe, [LONG + "at night"], 0, **options, negative_prompt="blurred")
    assert alone.tobytes() != night.tobytes()
