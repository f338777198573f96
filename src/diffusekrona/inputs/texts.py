"""Text files as people's editors leave them."""

from __future__ import annotations

import codecs
from pathlib import Path

from ..errors import KronAError

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: Path, what: str, error: type[KronAError] = KronAError) -> str:
    """A text file in UTF-8, with or without a mark at its start, or in UTF-16 with one; all lines end in a newline.

    Args:
        path: of the file.
        what: it is, such as "caption", for messages.
        error: what to raise.

    Raises:
        KronAError: of the class `error`; the file cannot be read, or is in another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"The {what} {path} cannot be read: {cause}") from cause
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as cause:
        raise error(f"The {what} {path} is not UTF-8 text ({cause.reason}). Save it as UTF-8.") from cause
    if "\0" in text:
        raise error(f"The {what} {path} is no text, or in UTF-16 without a mark. Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")
