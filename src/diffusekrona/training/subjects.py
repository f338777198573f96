"""Many subjects: a folder of pictures for each, and the settings that they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DatasetError, TrainingConfigError
from .settings import Settings, read_settings

OWN_SETTINGS = ("settings.yaml", "settings.toml")
"""File of a subject's folder with settings that are its own."""

NAME = "{name}"
"""In a prompt: the name of the subject's folder."""

_PROMPTS = ("instance_prompt", "class_prompt", "prior_prompt", "trigger_word", "validation_prompt")
_GIVEN = ("instance_data_dir", "dataset_dir", "dataset_name", "dataset_config_name", "output_dir")


@dataclass(frozen=True)
class Subject:
    """A subject to learn.

    Attributes:
        name: of its folder, and of its adapter's.
        settings: of its run, as `diffusekrona train` has them.
    """

    name: str
    settings: Settings


def find_subjects(folder: Path, output: Path, shared: Mapping[str, Any]) -> list[Subject]:
    """The subjects of a folder, one for each folder in it, by their names.

    Args:
        folder: of the subjects' folders of pictures.
        output: where a folder for each adapter goes.
        shared: settings of all of them, in one flat list; `{name}` in a prompt is the subject's name. A subject's own
            file of settings wins over them.

    Raises:
        DatasetError: there is no subject, or something else is in the folder, too.
        TrainingConfigError: the settings of one cannot be used.
    """
    for name in _GIVEN:
        if shared.get(name) is not None:
            raise TrainingConfigError(
                f"{name} is not a setting of many subjects, whose pictures are in the folders of {folder} and whose "
                f"adapters go to {output}. Leave it out."
            )
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder; give one that holds a folder of pictures for each subject.")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    if loose := [entry.name for entry in entries if not entry.is_dir()]:
        raise DatasetError(
            f"{folder} holds files beside the subjects' folders: {', '.join(loose[:5])}. Put the pictures of each "
            "subject into a folder of its own, or, of a single one, use train."
        )
    if not folders:
        raise DatasetError(f"{folder} is empty; put a folder of pictures for each subject into it.")
    return [Subject(entry.name, _settings(entry, output / entry.name, shared)) for entry in folders]


def _settings(folder: Path, output: Path, shared: Mapping[str, Any]) -> Settings:
    values = {**shared, **_own(folder), "instance_data_dir": folder, "output_dir": output}
    for name in _PROMPTS:
        if isinstance(values.get(name), str):
            values[name] = values[name].replace(NAME, folder.name)
        elif isinstance(values.get(name), (list, tuple)):
            values[name] = [str(one).replace(NAME, folder.name) for one in values[name]]
    try:
        return Settings.of(values)
    except TrainingConfigError as error:
        raise TrainingConfigError(f"The settings of {folder.name}: {error}") from error


def _own(folder: Path) -> dict[str, Any]:
    """The settings in a subject's folder; none where it has no such file."""
    files = [folder / name for name in OWN_SETTINGS if (folder / name).is_file()]
    if len(files) > 1:
        raise TrainingConfigError(f"{folder} has both {' and '.join(OWN_SETTINGS)}. Leave one of them out.")
    own = read_settings(files[0]) if files else {}
    if given := [name for name in _GIVEN if name in own]:
        raise TrainingConfigError(f"{files[0]} gives {given[0]}, which is the folder that it is in. Leave it out.")
    return own
