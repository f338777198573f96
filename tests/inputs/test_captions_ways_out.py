"""What the errors of captions and tables of prompts tell users to do instead is done here, and works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from diffusekrona.inputs.captions import METADATA, read_captions, read_prompts
from tests.refusals import refusal


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("cat.png", "dog.png"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


def test_a_missing_prompt_is_written_as_the_text_says(pictures):
    text = refusal(read_prompts, pictures)
    first = re.search(r"Write (\S+\.txt), or", text)[1]
    (pictures / first).write_text("a cat")
    line = re.search(rf"a line of {re.escape(METADATA)} such as (.*)\.$", refusal(read_prompts, pictures))[1]
    (pictures / METADATA).write_text(line)
    assert list(read_prompts(pictures)) == ["cat.png", "dog.png"]


def test_an_empty_caption_is_written_or_deleted(pictures):
    (pictures / METADATA).write_text(
        "".join(f'{{"file_name": "{name}.png", "text": "a"}}\n' for name in ("cat", "dog"))
    )
    caption = pictures / "dog.txt"
    caption.write_text(" ")
    text = refusal(read_prompts, pictures)
    assert "Write the prompt of dog.png in it" in text
    caption.write_text("a")
    assert read_prompts(pictures)["dog.png"] == "a"
    assert "or delete it if the image has a prompt elsewhere" in text
    caption.unlink()
    assert read_prompts(pictures)["dog.png"] == "a"


@pytest.mark.parametrize(
    ("file", "content", "said", "mended"),
    [
        ("prompts.txt", b"one\n", "it needs a line for each image", b"one\ntwo\n"),
        (METADATA, b"{\n", "Mend it", b'{"file_name": "cat.png", "text": "a"}\n{"file_name": "dog.png", "text": "b"}'),
        (METADATA, b'{"text": "a"}\n', 'each line needs "file_name" and "text"', None),
        ("prompts.json", b"[]", "must be a JSON object", b'{"cat.png": "a", "dog.png": "b"}'),
        ("prompts.json", b'{"cat.png": 1}', "must be a text", b'{"cat.png": "a", "dog.png": "b"}'),
        ("dog.txt", "ä".encode("latin-1"), "Save it as UTF-8", "ä".encode()),
    ],
)
def test_a_table_that_is_mended_as_the_text_says_is_read(file, content, said, mended, pictures):
    if file == "dog.txt":
        (pictures / "cat.txt").write_text("a cat")
    (pictures / file).write_bytes(content)
    assert said in refusal(read_prompts, pictures)
    if mended is None:
        rows = [{"file_name": name, "text": "a toy"} for name in ("cat.png", "dog.png")]
        mended = "\n".join(map(json.dumps, rows)).encode()
    (pictures / file).write_bytes(mended)
    assert len(read_prompts(pictures)) == 2


def test_a_broken_table_that_is_taken_away_is_not_missed(pictures):
    for name in ("cat", "dog"):
        (pictures / f"{name}.txt").write_text(name)
    (pictures / METADATA).write_text("{")
    assert "or take it away" in refusal(read_prompts, pictures)
    (pictures / METADATA).unlink()
    assert read_prompts(pictures) == {"cat.png": "cat", "dog.png": "dog"}


def test_of_two_captions_or_tables_one_is_taken_away(pictures):
    (pictures / "cat.txt").write_text("a cat")
    (pictures / "dog.txt").write_text("a dog")
    (pictures / "dog.caption").write_text("another dog")
    text = refusal(read_prompts, pictures)
    first, second = re.search(r"in (\S+) and in (\S+)\. Take one of them away", text).groups()
    (pictures / second).unlink()
    assert read_prompts(pictures)["dog.png"] == (pictures / first).read_text()
    for name in ("cat.txt", first):
        (pictures / name).unlink()
    for name in (METADATA, "prompts.txt"):
        (pictures / name).write_text(
            "one\ntwo\n" if name == "prompts.txt" else '{"file_name": "cat.png", "text": "a"}\n'
        )
    text = refusal(read_captions, pictures, ["cat.png", "dog.png"])
    first, second = re.search(r"in (\S+) and in (\S+)\. Take one of them away", text).groups()
    (pictures / second).unlink()
    read_captions(pictures, ["cat.png", "dog.png"])


def test_a_column_of_captions_is_one_that_the_text_names(pictures):
    rows = [{"file_name": f"{name}.png", "said": name} for name in ("cat", "dog")]
    (pictures / METADATA).write_text("\n".join(map(json.dumps, rows)))
    column = re.search(r"there are: (\w+)\. Name one by caption_column", refusal(read_captions, pictures, ["cat.png"]))[
        1
    ]
    read_captions(pictures, ["cat.png", "dog.png"], column)
