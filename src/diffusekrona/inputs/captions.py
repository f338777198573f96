"""The captions of images: in text files beside them, or in a table of their folder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..storage import write_whole
from .images import image_paths
from .texts import read_text

METADATA = "metadata.jsonl"
"""The table of a folder in the Hugging Face imagefolder layout: one JSON object per line."""

TABLES = (METADATA, "metadata.csv", "prompts.json", "prompts.txt")
"""Files of a folder that hold the captions of all its images."""

CAPTION_SUFFIXES = (".txt", ".caption")
"""What text files beside images are called, `dog.txt` or `dog.png.txt` beside `dog.png`."""


@dataclass(frozen=True)
class Captions:
    """The captions of a folder's images.

    Attributes:
        by_name: the caption of each image that has one, by the image's file name.
        files: where they were read from.
        without_image: names in a table that are no image of the folder.
    """

    by_name: Mapping[str, str]
    files: Sequence[Path]
    without_image: Sequence[str]


def read_captions(folder: Path, names: Sequence[str], column: str = "text") -> Captions:
    """The captions of images in a folder, each on one line.

    They are in text files beside the images, or in one of these tables: `metadata.jsonl`, whose
    lines have `file_name` and `text`; `metadata.csv`, with these columns; `prompts.json`, an object from file name to
    caption; `prompts.txt`, a line for each image in the order of their names.

    Args:
        folder: where the images are.
        names: of the images' files, in order.
        column: the name of the captions in `metadata.jsonl` and `metadata.csv`.

    Raises:
        DatasetError: a caption is empty or not a text in UTF-8, a table is broken, there are two, or an image has two
            captions that differ.
    """
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DatasetError(f"{folder} has captions in {tables[0].name} and in {tables[1].name}. Take one of them away.")
    path = tables[0] if tables else None
    table = {} if path is None else _table(path, names, column)
    files = [] if path is None else [path]
    found = {name: " ".join(caption.split()) for name, caption in table.items() if caption.strip() and name in names}
    beside = _files_beside(folder, names)
    for name, texts in beside.items():
        captions = {file: _caption(file, name) for file in texts}
        if path is not None and name in found:
            captions[path] = found[name]
        if len(set(captions.values())) > 1:
            first, second, *_ = captions
            raise DatasetError(
                f"{folder / name} has two captions that differ, in {first.name} and in {second.name}. "
                "Take one of them away."
            )
        found[name] = next(iter(captions.values()))
        files += texts
    return Captions(found, files, [name for name in table if name not in names])


def read_prompts(folder: str | Path) -> dict[str, str]:
    """The prompt of every image of a folder, by file name; see `read_captions` for where they are.

    Raises:
        DatasetError: no folder, no image, or an image without a prompt, which is named; or a broken caption.
    """
    paths = image_paths(folder)
    names = [path.name for path in paths]
    found = read_captions(paths[0].parent, names).by_name
    missing = [name for name in names if name not in found]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(paths)} images in {paths[0].parent} have no prompt: {_listed(missing)}. "
            f"Write {Path(missing[0]).with_suffix('.txt').name}, or a line of {METADATA} such as "
            + json.dumps({"file_name": missing[0], "text": "a dog on the moon"})
            + "."
        )
    return {name: found[name] for name in names}


def write_metadata(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put entries, by file name, into a folder's `metadata.jsonl`, beside those of other images that are still there.

    Raises:
        DatasetError: there is a table, but a broken one.
    """
    path = folder / METADATA
    earlier = _rows(path) if path.is_file() else {}
    rows = {name: row for name, row in earlier.items() if (folder / name).is_file()}
    rows |= {name: {"file_name": name, **entry} for name, entry in entries.items()}
    lines = [json.dumps(rows[name], ensure_ascii=False) for name in sorted(rows)]
    write_whole({path: ("\n".join(lines) + "\n").encode()})


def _files_beside(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """The text files beside each image, by the image's file name; some systems take capitals for small letters."""
    texts = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in CAPTION_SUFFIXES and path.name not in TABLES and not path.name.startswith(".")
    }
    found: dict[str, list[Path]] = {}
    for text, path in texts.items():
        stem = Path(text).stem
        exactly = [name for name in names if stem in (name, Path(name).stem)]
        for name in exactly or [name for name in names if stem.lower() in (name.lower(), Path(name).stem.lower())]:
            found.setdefault(name, []).append(path)
    return found


def _caption(path: Path, image: str) -> str:
    caption = " ".join(read_text(path, "caption", DatasetError).split())
    if not caption:
        raise DatasetError(
            f"The caption {path} is empty. "
            f"Write the prompt of {image} in it, or delete it if the image has a prompt elsewhere."
        )
    return caption


def _table(path: Path, names: Sequence[str], column: str) -> dict[str, str]:
    """Captions by file name."""
    if path.name.startswith("metadata"):
        return {name: _prompt(path, name, row, column) for name, row in _rows(path).items()}
    text = read_text(path, "table", DatasetError)
    if path.suffix == ".json":
        return {name: _text_of(path, name, prompt) for name, prompt in _parsed(path, text, "").items()}
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != len(names):
        raise DatasetError(
            f"{path} has {len(lines)} prompts for {len(names)} images; it needs a line for each image, "
            "in the order of their names."
        )
    return dict(zip(names, lines, strict=True))


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    text = read_text(path, "table", DatasetError)
    numbered: list[tuple[int, dict[str, Any]]]
    if path.suffix == ".csv":
        numbered = list(enumerate(csv.DictReader(io.StringIO(text)), 2))
    else:
        lines = enumerate(text.splitlines(), 1)
        numbered = [(number, _parsed(path, line, f", line {number},")) for number, line in lines if line.strip()]
    rows: dict[str, dict[str, Any]] = {}
    for number, row in numbered:
        name = row.get("file_name")
        if not isinstance(name, str):
            raise DatasetError(f'{path}, line {number}, has no "file_name"; each line needs "file_name" and "text".')
        if name in rows:
            raise DatasetError(f"{path}, line {number}, names {name} for the second time. Take one of them away.")
        rows[name] = row
    return rows


def _parsed(path: Path, text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{path}{where} is not JSON: {error}. Mend it, or take it away.") from error
    if not isinstance(value, dict):
        raise DatasetError(f"{path}{where} must be a JSON object, not {text[:40]!r}.")
    return value


def _prompt(path: Path, name: str, row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        others = [key for key in row if key != "file_name"]
        raise DatasetError(
            f"{path} has no {column!r} for {name}"
            + (f"; there are: {', '.join(map(str, others))}. Name one by caption_column." if others else ".")
        )
    return _text_of(path, name, row[column])


def _text_of(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"The prompt of {name} in {path} must be a text, not {value!r}.")
    return value


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
