"""What images show, in files beside them: a text file per image, or one table for a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DatasetError
from .images import image_paths
from .storage import write_whole

METADATA = "metadata.jsonl"
"""The table of a folder in the Hugging Face imagefolder layout: one JSON object per line."""

_TABLES = (METADATA, "prompts.json", "prompts.txt")


def read_caption(image_path: Path) -> str | None:
    """The text file beside an image, `dog.txt` beside `dog.png`, on one line; None without one.

    Raises:
        DatasetError: it is empty or not UTF-8.
    """
    path = image_path.with_suffix(".txt")
    if not path.is_file():
        return None
    caption = " ".join(_text(path, "caption").split())
    if not caption:
        raise DatasetError(
            f"The caption {path} is empty. "
            f"Write the prompt of {image_path.name} in it, or delete it to use the common one."
        )
    return caption


def read_prompts(folder: str | Path) -> dict[str, str]:
    """The prompt of every image of a folder, by file name.

    An image's own text file wins, `dog.txt` beside `dog.png`. The others' prompts are in the first of these that is
    there: `metadata.jsonl`, whose lines have `file_name` and `text`; `prompts.json`, an object from file name to
    prompt; `prompts.txt`, a line for each image in the order of their names.

    Raises:
        DatasetError: no folder, no image, or an image without a prompt, which is named; or a broken table.
    """
    paths = image_paths(folder)
    found = _table(paths[0].parent, [path.name for path in paths])
    prompts = {path.name: read_caption(path) or found.get(path.name, "").strip() for path in paths}
    missing = [name for name, prompt in prompts.items() if not prompt]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(paths)} images in {paths[0].parent} have no prompt: {_listed(missing)}. "
            f"Write {Path(missing[0]).with_suffix('.txt').name}, or a line of {METADATA} such as "
            + json.dumps({"file_name": missing[0], "text": "a dog on the moon"})
            + "."
        )
    return prompts


def write_metadata(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put entries, by file name, into a folder's `metadata.jsonl`, beside those of other images that are still there.

    Raises:
        DatasetError: there is a table, but a broken one.
    """
    path = folder / METADATA
    earlier = _metadata(path) if path.is_file() else {}
    rows = {name: row for name, row in earlier.items() if (folder / name).is_file()}
    rows |= {name: {"file_name": name, **entry} for name, entry in entries.items()}
    lines = [json.dumps(rows[name], ensure_ascii=False) for name in sorted(rows)]
    write_whole({path: ("\n".join(lines) + "\n").encode()})


def _table(folder: Path, names: list[str]) -> dict[str, str]:
    """Prompts by file name out of the first table that is there."""
    path = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    if path is None:
        return {}
    if path.name == METADATA:
        return {name: _prompt(path, name, row.get("text", "")) for name, row in _metadata(path).items()}
    if path.suffix == ".json":
        return {name: _prompt(path, name, prompt) for name, prompt in _parsed(path, _text(path), "").items()}
    lines = [line for line in _text(path).splitlines() if line.strip()]
    if len(lines) != len(names):
        raise DatasetError(
            f"{path} has {len(lines)} prompts for {len(names)} images; it needs a line for each image, "
            "in the order of their names."
        )
    return dict(zip(names, lines, strict=True))


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        row = _parsed(path, line, f", line {number},")
        name = row.get("file_name")
        if not isinstance(name, str):
            raise DatasetError(f'{path}, line {number}, has no "file_name"; each line needs "file_name" and "text".')
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


def _prompt(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"The prompt of {name} in {path} must be a text, not {value!r}.")
    return value


def _text(path: Path, what: str = "table") -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"The {what} {path} is not UTF-8 text. Save it as UTF-8.") from error


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
