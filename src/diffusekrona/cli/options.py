"""Flags of a command from the fields of dataclasses, so that names, types, defaults and help are said once."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_type_hints

import typer

from ..errors import KronAError
from ..training.settings import GROUPS, SHORTER, help_texts


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each setting; it gets those that were given, and no others, by name."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    kept = {p.name for p in own}
    flags = [_flag(one, heading, group) for heading, group in GROUPS.items() for one in fields(group)]

    def run(context: typer.Context, **values: Any) -> None:
        given = {name: value for name, value in values.items() if name in kept or _is_given(context, name)}
        if "factors" in given:
            given["factors"] = factor_pattern(given["factors"])
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    signature = inspect.Signature([context, *own, *flags])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return run


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _flag(one: Field[Any], heading: str, group: type) -> inspect.Parameter:
    kind: Any = get_type_hints(group)[one.name]
    flag = f"--{one.name.replace('_', '-')}"
    names = [flag, *(f"--{short}" for short, name in SHORTER.items() if name == one.name)]
    options: dict[str, Any] = {"help": help_texts(group)[one.name], "rich_help_panel": heading}
    default = None if one.default is MISSING else one.default
    if kind is bool:
        names[0] += f"/--no-{flag[2:]}"
    elif one.name == "factors":
        kind, options["metavar"] = list[str] | None, "REGEX=A1,A2"
    elif default is None:
        kind |= None
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(*names, **options)],
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
