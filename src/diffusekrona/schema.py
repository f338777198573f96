"""Settings that are declared once: pydantic models whose errors are sentences, and the files that they come from.

Of each setting, its declaration gives the check, the key in a file, the flag with its help and the JSON schema.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError
from pydantic.fields import FieldInfo

from .errors import KronAError
from .inputs.texts import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from typing_extensions import Self


class SettingsModel(BaseModel):
    """A group of settings, which does not change. Types are strict: `true` is no number, and "5" none either."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    error: ClassVar[type[KronAError]] = KronAError

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self.error(" ".join(_problems(error, type(self), values))) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} does not change; .replace({name}=…) gives another one.")

    def replace(self, **values: Any) -> Self:
        """The same settings but for some, checked as new ones are."""
        return type(self)(**{**dict(self), **values})


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # which pydantic would not take for a wrong value
        raise ValueError(error) from error


FilePath = Annotated[Path, Strict(False), AfterValidator(_expanded)]
"""A path, also as a text; `~` is the home folder."""


DType = Literal["float32", "float16", "bfloat16"]
"""A type that weights are loaded in."""


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


TextList = Annotated[list[str], BeforeValidator(_listed)]
"""Texts, also a single one by itself."""


def short_name(field: FieldInfo) -> str | None:
    """Another name of a setting, declared as `json_schema_extra={"short": …}`."""
    extra = field.json_schema_extra
    short = extra.get("short") if isinstance(extra, dict) else None
    return short if isinstance(short, str) else None


def unknown(name: str, known: Iterable[str]) -> str:
    """That there is no setting of a name, and the nearest one of those that there are."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"There is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")


def _problems(error: ValidationError, group: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting that is wrong."""
    schema = _schema(group)
    found: dict[str, str] = {}
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if isinstance(cause, KronAError):
            found[name] = str(cause)
        elif name not in schema:
            found[name] = unknown(name, schema)
        elif problem["type"] == "missing":
            found[name] = f"{name} is missing; it must be {_expected(schema[name])}."
        else:
            found[name] = f"{name} must be {_expected(schema[name])}, not {values[name]!r}."
    return list(found.values())


@cache
def _schema(group: type[BaseModel]) -> dict[str, Any]:
    properties: dict[str, Any] = group.model_json_schema()["properties"]
    return properties


def _expected(schema: Mapping[str, Any]) -> str:
    """What a setting may be, such as "a whole number of at least 1"."""
    kind, *_ = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    if choices := kind.get("enum") or [value for key, value in kind.items() if key == "const"]:
        return f"one of {', '.join(choices)}" if len(choices) > 1 else repr(choices[0])
    if "examples" in schema:
        return f"such as {schema['examples'][0]}"
    bounds = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    limits = " and ".join(f"{text} {kind[bound]:g}" for bound, text in bounds.items() if bound in kind)
    return f"{_KINDS[kind.get('format') or kind['type']]} {limits}".rstrip()


_KINDS = {
    "integer": "a whole number",
    "number": "a finite number",
    "boolean": "true or false",
    "string": "a text",
    "path": "a path",
    "array": "a text or a list of texts",
    "object": "names with their values",
}


class _YamlLoader(yaml.SafeLoader):
    """PyYAML's, but that 1e-4 is a number, as in YAML 1.2; in PyYAML's 1.1 it is a text."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def yaml_value(text: str) -> Any:
    """A value as a YAML file would have it, or else the text itself."""
    try:
        return yaml.load(text, _YamlLoader)
    except yaml.YAMLError:
        return text


def read_mapping(path: Path, error: type[KronAError]) -> dict[Any, Any]:
    """The names and values of a YAML file, or of a TOML file.

    Raises:
        KronAError: of the class `error`, where the file cannot be read or is not of this kind.
    """
    text = read_text(path, "settings file", error)
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _YamlLoader)
    except (ValueError, yaml.YAMLError) as cause:
        raise error(f"The settings {path} cannot be read: {cause}") from cause
    if not isinstance(values, dict):
        raise error(f"The settings {path} should be names and values, such as `a1: 4`.")
    return values
