"""What all studies of one base share: models, subjects, prompts, training and drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from diffusekrona.errors import KronAError, TrainingConfigError
from diffusekrona.schema import read_mapping, unknown
from diffusekrona.training import TrainingConfig


class StudySettingsError(KronAError):
    """The settings of a study name something that is not there, or cannot be used."""


@dataclass(frozen=True)
class Subject:
    """A subject to personalise on.

    Attributes:
        images: a folder of pictures, with caption files or without.
        kind: its class word, such as "dog".
    """

    images: str
    kind: str


@dataclass(frozen=True)
class StudySettings:
    """One base and how it is studied.

    Args:
        base: a pipeline's folder or hub id.
        clip: a CLIP model's folder or hub id.
        dino: a self-supervised vision model's.
        subjects: by name. Paths are relative to the working directory.
        prompts: with "{}" where the subject stands, such as "a {} on the beach".
        other_prompts: without the subject, for drift.
        held_back: names of subjects that no choice is made on.
        identifier: the rare word before the class word.
        dtype: of the base.
        resolution: side of the training images in pixels; by default the base's own.
        training: fields of `TrainingConfig` that all models share.
        inference_steps: denoising steps of the pictures.
        guidance_scale: of the pictures.
        generation_batch_size: pictures per pass.
        image_seed: of the first picture; not a seed of any training.
        scenes: whether prompts and pictures are those of the small base, whose background, place, size and number
            can be read off a picture.
        studies: values that replace a study's own, by its name.

    Raises:
        StudySettingsError: a value that no study could use.
    """

    base: str
    clip: str
    dino: str
    subjects: Mapping[str, Subject]
    prompts: tuple[str, ...]
    other_prompts: tuple[str, ...]
    held_back: tuple[str, ...] = ()
    identifier: str = "sks"
    dtype: str = "float32"
    resolution: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    inference_steps: int = 50
    guidance_scale: float = 7.5
    generation_batch_size: int = 8
    image_seed: int = 1000
    scenes: bool = False
    studies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            if prompt.count("{}") != 1:
                raise StudySettingsError(f'The prompt {prompt!r} should have "{{}}" once, where the subject stands.')
        if not self.subjects or not self.prompts or not self.other_prompts:
            raise StudySettingsError("A study needs subjects, prompts and other_prompts.")
        for name in self.held_back:
            if name not in self.subjects:
                raise StudySettingsError(f"held_back names {name!r}, which is none of the subjects.")
        self.config({})

    @property
    def open_subjects(self) -> tuple[str, ...]:
        """Subjects that learning rates and configurations are chosen on."""
        return tuple(name for name in self.subjects if name not in self.held_back)

    def name_of(self, subject: str) -> str:
        """A subject's name without an article, such as "sks dog"."""
        return f"{self.identifier} {self.subjects[subject].kind}"

    def config(self, values: Mapping[str, Any]) -> TrainingConfig:
        """How to train, with some values of one's own."""
        try:
            return TrainingConfig(**{**self.training, **values})
        except TrainingConfigError as error:
            raise StudySettingsError(f"The study's training cannot be as it says. {error}") from error

    def check_folders(self) -> None:
        """Raise `StudySettingsError` if some subject's pictures are not there."""
        for name, subject in self.subjects.items():
            if not Path(subject.images).is_dir():
                raise StudySettingsError(f"The pictures of {name} should be in the folder {subject.images}.")

    def shared(self) -> dict[str, Any]:
        """All that a measurement depends on beside its cell."""
        values = asdict(self)
        for name in ("studies", "held_back", "generation_batch_size"):
            del values[name]
        return values


def read_study_settings(path: Path) -> StudySettings:
    """From a YAML file.

    `extends` names another such file, beside this one, whose settings these replace. `subjects` may be a folder: each
    folder in it is a subject, and its `classes.csv` has their class words in lines "name,class". `prompts` and
    `other_prompts` may be text files with one in each line.

    Raises:
        StudySettingsError: it cannot be read, has an unknown name, or lacks one.
    """
    values = _read(path)
    known = {one.name: one for one in fields(StudySettings)}
    for name in values:
        if name not in known:
            raise StudySettingsError(f"{path}: {unknown(str(name), known)}")
    missing = [
        name
        for name, one in known.items()
        if one.default is MISSING and one.default_factory is MISSING and name not in values
    ]
    if missing:
        raise StudySettingsError(f"{path} lacks {', '.join(missing)}.")
    subjects = values.pop("subjects")
    subjects = _in_folder(Path(subjects)) if isinstance(subjects, str) else _listed(subjects, path)
    for name in ("prompts", "other_prompts"):
        if isinstance(values[name], str):
            values[name] = _lines(Path(values[name]))
    ready: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return StudySettings(subjects=subjects, **ready)


def _read(path: Path) -> dict[str, Any]:
    values = read_mapping(path, StudySettingsError)
    extended = values.pop("extends", None)
    return values if extended is None else {**_read(path.parent / extended), **values}


def _listed(subjects: Any, path: Path) -> dict[str, Subject]:
    try:
        return {str(name): Subject(**one) for name, one in subjects.items()}
    except (TypeError, AttributeError) as error:
        raise StudySettingsError(f"In {path}, each of the subjects needs its `images` and its `kind`.") from error


def _in_folder(folder: Path) -> dict[str, Subject]:
    kinds = dict(line.split(",", 1) for line in _lines(folder / "classes.csv") if "," in line)
    names = sorted(part.name for part in folder.iterdir() if part.is_dir())
    unknown = [name for name in names if name not in kinds]
    if unknown:
        raise StudySettingsError(f"{folder / 'classes.csv'} has no class word of {', '.join(unknown)}.")
    return {name: Subject(str(folder / name), kinds[name].strip()) for name in names}


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise StudySettingsError(f"{path} cannot be read: {error}") from error
