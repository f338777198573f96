"""The site loads nothing from elsewhere: it works offline, and tells no one who reads it."""

import re
from typing import Any

from mkdocs.exceptions import PluginError

LOADED = re.compile(r'<(?:script|img|iframe|link|source)\b[^>]*?\b(?:src|href)="((?:https?:)?//[^"]+)"')


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Stop the build at a script, style, font or picture of another site."""
    if found := LOADED.findall(output):
        raise PluginError(f"{page.file.src_uri} loads {', '.join(found)}. Put what it needs into docs/ instead.")
    return output
