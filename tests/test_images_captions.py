"""Prompts beside images: which file they are in, and what is said where one is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffusekrona.errors import DatasetError
from diffusekrona.images import read_prompts, write_metadata


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.jpg", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def lines(*rows: dict[str, object]) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("prompts.txt", "one\n\n two \nthree\n"),
        ("prompts.json", '{"a.png": "one", "b.jpg": "two", "c.png": "three", "gone.png": "x"}'),
        (
            "metadata.jsonl",
            lines(
                {"file_name": "c.png", "text": "three", "seed": 3},
                {"file_name": "a.png", "text": "one"},
                {"file_name": "b.jpg", "text": "two"},
            ),
        ),
    ],
)
def test_each_table_gives_every_image_its_prompt(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text("\ufeff" + text, encoding="utf-8")
    assert read_prompts(folder) == {"a.png": "one", "b.jpg": "two", "c.png": "three"}


def test_an_images_own_text_wins_and_metadata_before_the_other_tables(folder: Path) -> None:
    (folder / "b.txt").write_text("my own")
    (folder / "metadata.jsonl").write_text(
        lines(*({"file_name": n, "text": "meta"} for n in ("a.png", "b.jpg", "c.png")))
    )
    (folder / "prompts.json").write_text('{"a.png": "json", "b.jpg": "json", "c.png": "json"}')
    (folder / "prompts.txt").write_text("only one line")
    assert read_prompts(folder) == {"a.png": "meta", "b.jpg": "my own", "c.png": "meta"}


def test_images_without_a_prompt_are_named(folder: Path) -> None:
    (folder / "b.txt").write_text("my own")
    (folder / "prompts.json").write_text('{"a.png": " "}')
    with pytest.raises(DatasetError, match=r"2 of 3 images in .* have no prompt: a\.png, c\.png\. Write a\.txt"):
        read_prompts(folder)


def test_of_many_without_a_prompt_five_are_named(tmp_path: Path) -> None:
    for number in range(8):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    with pytest.raises(DatasetError, match=r"0\.png, 1\.png, 2\.png, 3\.png, 4\.png and 3 more"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("prompts.txt", "one\ntwo\n", "has 2 prompts for 3 images"),
        ("prompts.json", "{", "prompts.json is not JSON"),
        ("prompts.json", '["one"]', "must be a JSON object"),
        ("prompts.json", '{"a.png": 3}', "prompt of a.png in .* must be a text, not 3"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{', "metadata.jsonl, line 2, is not JSON"),
        ("metadata.jsonl", '{"text": "x"}', 'line 1, has no "file_name"'),
        ("metadata.jsonl", '{"file_name": "a.png"}', "have no prompt: a.png"),
    ],
)
def test_a_broken_table_is_named(folder: Path, file: str, text: str, said: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(DatasetError, match=said):
        read_prompts(folder)


def test_a_table_that_is_no_text_is_named(folder: Path) -> None:
    (folder / "prompts.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DatasetError, match=r"prompts\.txt is not UTF-8"):
        read_prompts(folder)


def test_written_metadata_keeps_what_other_images_have(folder: Path) -> None:
    write_metadata(folder, {"a.png": {"text": "ein Bär", "seed": 1}, "b.jpg": {"text": "old"}})
    (folder / "gone.png").touch()
    write_metadata(folder, {"gone.png": {"text": "gone"}})
    (folder / "gone.png").unlink()
    write_metadata(folder, {"b.jpg": {"text": "new"}, "c.png": {"text": "three"}})
    assert read_prompts(folder) == {"a.png": "ein Bär", "b.jpg": "new", "c.png": "three"}
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"file_name": "a.png", "text": "ein Bär", "seed": 1}
    assert [row["file_name"] for row in rows] == ["a.png", "b.jpg", "c.png"]
