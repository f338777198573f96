"""Prompts beside images: which file they are in, and what is said where one is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffusekrona.errors import DatasetError
from diffusekrona.inputs.captions import read_captions, read_prompts, write_metadata


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


def test_an_image_may_have_its_caption_in_its_own_file_and_the_others_in_a_table(folder: Path) -> None:
    (folder / "b.txt").write_text("my own")
    (folder / "metadata.jsonl").write_text(lines(*({"file_name": n, "text": "meta"} for n in ("a.png", "c.png"))))
    assert read_prompts(folder) == {"a.png": "meta", "b.jpg": "my own", "c.png": "meta"}


@pytest.mark.parametrize("file", ["a.txt", "a.TXT", "A.TXT", "a.caption", "a.png.txt", "a.png.caption"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_caption_beside_its_image_is_found_by_each_name_and_in_each_encoding(
    folder: Path, file: str, encoding: str
) -> None:
    (folder / file).write_bytes("a sks Bär,\r\n on a table\r\n".encode(encoding))
    found = read_captions(folder, ["a.png", "b.jpg"])
    assert found.by_name == {"a.png": "a sks Bär, on a table"}
    assert found.files == [folder / file]


def test_capitals_tell_files_apart_where_there_are_both(folder: Path) -> None:
    Image.new("RGB", (4, 4)).save(folder / "A.png")
    (folder / "a.txt").write_text("small")
    assert read_captions(folder, ["A.png", "a.png"]).by_name == {"a.png": "small"}


def test_two_captions_that_differ_are_an_error_and_two_that_are_equal_none(folder: Path) -> None:
    (folder / "a.txt").write_text("a toy")
    (folder / "a.caption").write_text("a  toy\n")
    assert read_captions(folder, ["a.png"]).by_name == {"a.png": "a toy"}
    (folder / "a.caption").write_text("another")
    with pytest.raises(DatasetError, match=r"a\.png has two captions that differ, in a\.caption and in a\.txt"):
        read_captions(folder, ["a.png"])
    (folder / "a.caption").unlink()
    (folder / "metadata.jsonl").write_text(lines({"file_name": "a.png", "text": "from the table"}))
    with pytest.raises(DatasetError, match=r"two captions that differ, in a\.txt and in metadata\.jsonl"):
        read_captions(folder, ["a.png"])


def test_two_tables_are_an_error(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(lines({"file_name": "a.png", "text": "x"}))
    (folder / "prompts.txt").write_text("x\ny\nz\n")
    with pytest.raises(DatasetError, match=r"captions in metadata\.jsonl and in prompts\.txt"):
        read_captions(folder, ["a.png"])


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv"])
def test_the_captions_may_be_in_another_column(folder: Path, file: str) -> None:
    row = lines({"file_name": "a.png", "prompt": "a toy"}) if file.endswith("l") else "file_name,prompt\na.png,a toy\n"
    (folder / file).write_text(row)
    assert read_captions(folder, ["a.png"], "prompt").by_name == {"a.png": "a toy"}
    with pytest.raises(DatasetError, match=r"no 'text' for a\.png; there are: prompt\. Name one by caption_column"):
        read_captions(folder, ["a.png"])


def test_a_tables_rows_without_an_image_are_told(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\ngone.png,two\n")
    assert read_captions(folder, ["a.png"]).without_image == ["gone.png"]


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
        ("metadata.jsonl", '{"file_name": "a.png"}', "no 'text' for a.png"),
        (
            "metadata.jsonl",
            lines(*[{"file_name": "a.png", "text": "x"}] * 2),
            "line 2, names a.png for the second",
        ),
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
