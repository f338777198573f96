"""What a study measures: one adapted model, seen in one way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

BASE = "base"
"""In place of a method: the model as it is, which does not know the subject."""


@dataclass(frozen=True)
class Spec:
    """How a model is adapted and trained.

    Attributes:
        method: a name that `methods` has, or `BASE`.
        options: of the method.
        training: fields of `TrainingConfig` that differ from the study's own.
        images: how many of the subject's pictures are used; None is all.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    images: int | None = None


@dataclass(frozen=True)
class View:
    """After how many steps a model is looked at, and how its pictures are drawn; None is the study's own.

    Attributes:
        step: of the training.
        guidance_scale: of the pictures.
        inference_steps: of the pictures.
        spectrum: whether the singular values of the updates are taken, too.
    """

    step: int | None = None
    guidance_scale: float | None = None
    inference_steps: int | None = None
    spectrum: bool = False


@dataclass(frozen=True)
class Arm:
    """One choice that a study compares, before a subject and a seed are chosen.

    Attributes:
        label: what tables and figures call it.
        spec: how a model is adapted and trained.
        view: how it is looked at.
        series: the line of a figure that it belongs to.
        x: where on that line, such as a learning rate.
    """

    label: str
    spec: Spec
    view: View = View()
    series: str = ""
    x: float | None = None


@dataclass(frozen=True)
class Cell:
    """One measurement: equal cells of different studies are measured once."""

    spec: Spec
    view: View
    subject: str
    seed: int

    @property
    def key(self) -> str:
        """Tells this cell from every other; a hash of all that it is."""
        return _hash(asdict(self))

    @property
    def model_key(self) -> str:
        """The same for the trained model, which cells with other views share up to the steps they look at."""
        return _hash({**asdict(self), "view": None})

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """From what `as_dict` gave."""
        spec = Spec(**{one.name: values["spec"][one.name] for one in fields(Spec)})
        view = View(**{one.name: values["view"][one.name] for one in fields(View)})
        return cls(spec, view, values["subject"], values["seed"])


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:20]
