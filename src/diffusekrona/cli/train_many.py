"""`diffusekrona train-many`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.settings import read_settings
from .console import errors, print_line
from .options import flags_of_training, with_flags
from .progress import subjects_progress

_NOT_HERE = {"instance_data_dir", "dataset_dir", "dataset_name", "dataset_config_name", "output_dir"}


@with_flags([flag for flag in flags_of_training() if flag.name not in _NOT_HERE])
def train_many(
    subjects: Annotated[
        Path,
        typer.Argument(
            help="Folder that holds a folder of pictures for each subject, with a settings.yaml of its own if need be."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder where an adapter for each subject goes, and summary.json.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML or TOML file of settings, by the names of the flags, which win over it.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Number of subjects whose images share a batch.")] = 4,
    ray: Annotated[
        str | None,
        typer.Option(
            help='Spread the subjects over the workers of a Ray cluster: its address, or "local" for this machine. '
            "Needs diffusekrona[serve]; all folders must be where every worker finds them."
        ),
    ] = None,
    **given: Any,
) -> None:
    """Teach a base model many subjects, an adapter each. In a prompt, {name} is the name of a subject's folder."""
    from ..training.many import Ended, train_many, write_summary
    from ..training.subjects import find_subjects

    shared = {**(read_settings(config) if config else {}), **given}
    found = find_subjects(subjects, output, shared)

    def tell(one: Ended) -> None:
        if one.state == "set aside":
            errors.print(f"{one.name} is set aside: {one.reason}", soft_wrap=True, markup=False, highlight=False)

    with subjects_progress(len(found)) as (on_step, on_end):

        def after(one: Ended) -> None:
            tell(one)
            on_end(one.name)

        if ray is None:
            ended = train_many(found, at_once, on_step, after)
        else:
            from ..serving.training import train_over_ray

            ended = train_over_ray(found, ray, at_once, after)
    file = write_summary(output, ended)
    counts = {state: sum(one.state == state for one in ended) for state in ("trained", "earlier", "set aside")}
    print_line(", ".join(f"{count} {state}" for state, count in counts.items() if count) + f": {file}")
    if counts["set aside"]:
        raise typer.Exit(1)
