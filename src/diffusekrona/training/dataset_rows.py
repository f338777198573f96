"""The rows of Hugging Face datasets: of those that `save_to_disk` wrote, and of those that `load_dataset` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import DatasetError

TRAIN = "train"
"""The split that is trained on."""


def saved_rows(folder: str | Path) -> Any:
    """The rows of a dataset that `save_to_disk` wrote; of one with splits, those of "train".

    Raises:
        DatasetError: no such dataset, or no such split.
    """
    datasets = _package()
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{folder} is no dataset that save_to_disk wrote: {error}") from error
    if isinstance(found, dict) and TRAIN not in found:
        raise DatasetError(f"{folder} has no split 'train'; give the folder of one of its splits: {', '.join(found)}.")
    return found[TRAIN] if isinstance(found, dict) else found


def named_rows(name: str, config: str | None = None) -> Any:
    """The rows of the split "train" of a dataset that the package datasets finds by its name.

    Args:
        name: a folder of pictures or of files such as parquet, or else an id on the hub, such as "owner/name".
        config: which of its configurations, where it has several.

    Raises:
        DatasetError: no such dataset, configuration or split, or one that cannot be read.
    """
    datasets = _package()
    folder = Path(name).expanduser()
    here = folder.is_dir()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        raise DatasetError(f"{folder} is a dataset that save_to_disk wrote: give it as dataset_dir.")
    # A reader's name would mean whatever lies in the current folder.
    if not name.strip("/ ") or (not here and name in getattr(datasets.packaged_modules, _OF_READERS, {})):
        raise DatasetError(f"dataset_name is {name!r}, which names no dataset: give a folder, or an id of the hub.")
    try:
        found = datasets.load_dataset(str(folder.absolute()) if here else name, config)
    except Exception as error:  # whatever the readers of many kinds of files raise
        raise DatasetError(_told(name, config, folder if here else None, error)) from error
    if TRAIN not in found:
        raise DatasetError(f"The dataset {name} has no split 'train'; its splits are: {', '.join(found)}.")
    return found[TRAIN]


_OF_READERS = "_PACKAGED_DATASETS_MODULES"
"""Where the package datasets keeps the names of its readers, such as "parquet" and "imagefolder"."""


def _package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DatasetError("Reading a dataset needs the package datasets: pip install datasets.") from error
    return datasets


def _told(name: str, config: str | None, folder: Path | None, error: Exception) -> str:
    """What to say of a dataset that could not be loaded: from a folder, or else from the hub."""
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    options = f"dataset_name {name!r}" + ("" if config is None else f" with dataset_config_name {config!r}")
    if folder is not None:
        return f"{options}: the folder {folder.absolute()} cannot be read as a dataset: {reason}"
    return (
        f"{options}: there is no such folder (looked for {Path(name).expanduser().absolute()}), and the hub gave no "
        f"such dataset: {reason}"
    )
