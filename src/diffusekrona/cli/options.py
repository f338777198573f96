"""Flags from the fields of settings, so that names, types, defaults and help are declared once."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from ..errors import KronAError
from ..schema import SettingsModel, short_name, yaml_value
from ..training.script_names import MEANT
from ..training.settings import GROUPS

Flags = list[inspect.Parameter]


def flags_of(group: type[SettingsModel], names: Iterable[str] | None = None, heading: str | None = None) -> Flags:
    """A flag for each setting of a group, or only for the named ones."""
    return [_flag(group, name, heading) for name in names or group.model_fields]


def flags_of_training() -> Flags:
    """A flag for each setting of a run, under the headings of their groups, and hidden ones by Diffusers' names."""
    ours = [flag for group in GROUPS for flag in flags_of(group.model, heading=group.heading)]
    return ours + [_hidden(name, kind) for name, (kind, _) in MEANT.items()]


def with_flags(flags: Flags) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add flags to a command. It is called by name with those that the user gave, and no others."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        always = {p.name for p in own}

        def run(context: typer.Context, **values: Any) -> None:
            given = {name: value for name, value in values.items() if name in always or _is_given(context, name)}
            if "factors" in given:
                given["factors"] = factor_pattern(given["factors"])
            if "optimizer_args" in given:
                given["optimizer_args"] = named_values(given["optimizer_args"])
            command(**given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        signature = inspect.Signature([context, *own, *flags])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def help_of(group: type[SettingsModel], name: str) -> str:
    """The help of a setting, on one line."""
    return " ".join((group.model_fields[name].description or "").split())


def _flag(group: type[SettingsModel], name: str, heading: str | None) -> inspect.Parameter:
    field, kind = group.model_fields[name], get_type_hints(group)[name]
    flag, short = f"--{name.replace('_', '-')}", short_name(field)
    options: dict[str, Any] = {"help": help_of(group, name), "rich_help_panel": heading}
    default = None if field.is_required() or field.default_factory is not None else field.default
    if kind is bool:
        flag += f"/--no-{flag[2:]}"
    elif get_origin(kind) is dict:
        kind, options["metavar"] = list[str] | None, "REGEX=A1,A2" if name == "factors" else "NAME=VALUE"
    elif default is None:
        kind |= None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(*([f"--{short}"] if short else []), flag, **options)],
    )


def _hidden(name: str, kind: Any) -> inspect.Parameter:
    option = typer.Option(
        f"--{name.replace('_', '-')}", hidden=True, help="Name that Diffusers' scripts have for a setting of ours."
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def factor_pattern(options: list[str]) -> dict[str, tuple[int, int]]:
    """`REGEX=A1,A2` options as KronAConfig's `factor_pattern`. The expression may hold equals signs."""
    pattern = {}
    for option in options:
        found = re.fullmatch(r"(.+)=\s*(\d+)\s*,\s*(\d+)\s*", option)
        if found is None:
            raise KronAError(f'--factors takes REGEX=A1,A2, such as "to_k|to_v=2,32", not {option!r}.')
        pattern[found[1].strip()] = (int(found[2]), int(found[3]))
    return pattern


def named_values(options: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` options as `optimizer_args`; a value is what it would be in a YAML file."""
    values = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not name.strip():
            raise KronAError(f"--optimizer-args takes NAME=VALUE, such as weight_decay=0.01, not {option!r}.")
        values[name.strip()] = yaml_value(text)
    return values
