"""What every method has in common: it is put into a pipeline, saved, and taken out again."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import nn

from diffusekrona.errors import AdapterFileError, KronAError
from diffusekrona.storage import safetensors_bytes, write_whole
from diffusekrona.tuner.components import adaptable_components, all_modules, remember, restore
from diffusekrona.tuner.names import in_component, is_denoiser

HEADER = "diffusekrona_method"
"""Entry of a saved file's header: the method's name and options, as JSON."""


class MethodError(KronAError):
    """An unknown method or option, or a pipeline that does not suit the method."""


_prepared: WeakKeyDictionary[nn.Module, Method] = WeakKeyDictionary()
"""Component → the method that is in it."""


@dataclass(frozen=True)
class Method(ABC):
    """A way to teach a pipeline a subject. It decides which parameters train, and how they are saved.

    All methods are used alike: `prepare` a pipeline, hand what it returns to an optimizer, `save`. `remove` gives the
    base back, bit for bit. A pipeline holds one method at a time, and a fresh one does not change the
    pipeline's output. Trained parameters are float32 whatever the base's dtype.

    Attributes:
        name: what `method_from` knows it by.
        label: what tables call it.
        file_name: of what `save` writes.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    file_name: ClassVar[str] = "weights.safetensors"

    text_encoders: bool = field(default=False, kw_only=True)
    """Whether the text encoders are trained, too, as the paper does for SD 1.x; otherwise just the denoiser."""

    def __post_init__(self) -> None:
        check_flag("text_encoders", self.text_encoders)

    @property
    def description(self) -> str:
        """The method and its options in a few words."""
        where = "denoiser and text encoders" if self.text_encoders else "denoiser"
        options = ", ".join(f"{name}={value}" for name, value in self.options().items() if name != "text_encoders")
        return f"{self.label} ({options}), {where}" if options else f"{self.label}, {where}"

    def options(self) -> dict[str, Any]:
        """The options by name, values for JSON."""
        return asdict(self)

    def chosen(self, pipe: Any) -> dict[str, nn.Module]:
        """The components that the method trains, by name."""
        found = adaptable_components(pipe)
        return {part: module for part, module in found.items() if self.text_encoders or is_denoiser(part)}

    def count(self, pipe: Any) -> int:
        """Number of parameters that `prepare` would train, by the shapes alone. The pipeline holds no method yet."""
        return sum(self._count(component) for component in self.chosen(pipe).values())

    def prepare(self, pipe: Any) -> dict[str, nn.Parameter]:
        """Freeze a pipeline, put the method in, and return the trained parameters by `<component>.<name>`.

        All or nothing: where a component cannot take it, the pipeline is as before.

        Raises:
            MethodError: the pipeline holds a method or another adapter, or has nothing that this method trains.
        """
        check_bare(pipe)
        chosen, modules = self.chosen(pipe), all_modules(pipe)
        remember(modules)
        touched = []
        try:
            for component in chosen.values():
                touched.append(component)
                self._install(component)
        except BaseException:
            for component in touched:
                self._take_out(component)
            restore(modules)
            raise
        _prepared.update(dict.fromkeys(chosen.values(), self))
        trained = self.parameters(pipe)
        own = set(trained.values())
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.requires_grad_(parameter in own)
        return trained

    def parameters(self, pipe: Any) -> dict[str, nn.Parameter]:
        """The trained parameters of a prepared pipeline, by `<component>.<name>`.

        Raises:
            MethodError: this method is not in the pipeline.
        """
        return {
            in_component(part, key): parameter
            for part, component in self._held(pipe).items()
            for key, parameter in self._trained(component).items()
        }

    def save(self, pipe: Any, folder: str | PathLike[str]) -> Path:
        """Write the trained parameters as `<folder>/<file_name>`, whole or not at all. Returns the file's path.

        Raises:
            MethodError: this method is not in the pipeline.
            AdapterFileError: a trained number is not finite; nothing was written.
            OSError: the file cannot be written; an older one there is as it was.
        """
        trained = self.parameters(pipe)
        for key, parameter in trained.items():
            if not bool(parameter.detach().isfinite().all()):
                raise AdapterFileError(f"{key} holds an infinity or a NaN; nothing was saved.")
        path = Path(folder).expanduser() / self.file_name
        header = {HEADER: json.dumps({"method": self.name, "options": self.options()}, sort_keys=True)}
        write_whole({path: safetensors_bytes(trained, header | self._header(self._held(pipe)))})
        return path

    def remove(self, pipe: Any) -> None:
        """Take the method out. The pipeline is the base again, bit for bit, and as trainable as before.

        Raises:
            MethodError: this method is not in the pipeline.
        """
        for component in self._held(pipe).values():
            self._take_out(component)
            del _prepared[component]
        restore(all_modules(pipe))

    @abstractmethod
    def _count(self, component: nn.Module) -> int:
        """Number of trained parameters of one component."""

    @abstractmethod
    def _install(self, component: nn.Module) -> None:
        """Put the method into one component. Freezing is done for it; where it fails, `_take_out` is called."""

    @abstractmethod
    def _trained(self, component: nn.Module) -> dict[str, nn.Parameter]:
        """The trained parameters of one component, by the names that they are saved under."""

    @abstractmethod
    def _take_out(self, component: nn.Module) -> None:
        """Undo `_install`, also one that failed half-way."""

    def _header(self, components: Mapping[str, nn.Module]) -> dict[str, str]:
        """Further entries of a file's header, for other readers."""
        return {}

    def _held(self, pipe: Any) -> dict[str, nn.Module]:
        chosen = self.chosen(pipe)
        for component in chosen.values():
            if _prepared.get(component) != self:
                held = _prepared.get(component)
                raise MethodError(
                    f"The {type(component).__name__} holds {held.description if held else 'no method'}, not "
                    f"{self.description}; put it in first with prepare."
                )
        return chosen


def check_bare(pipe: Any) -> None:
    """Raise `MethodError` if some component of a pipeline holds a method or an adapter."""
    for part, component in adaptable_components(pipe).items():
        held = _prepared.get(component)
        if held is not None or getattr(component, "peft_config", None):
            what = held.description if held is not None else "an adapter"
            raise MethodError(
                f"{part or 'The model'} already holds {what}. One method at a time: take it out with its remove(pipe), "
                "or load the base again."
            )


def check_flag(name: str, value: object) -> None:
    """Raise `MethodError` unless an option is True or False."""
    if not isinstance(value, bool):
        raise MethodError(f"{name} must be True or False, not {value!r}.")


def check_whole(name: str, value: object) -> None:
    """Raise `MethodError` unless an option is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MethodError(f"{name} must be a whole number of at least 1, not {value!r}.")


def check_scale(name: str, value: object) -> None:
    """Raise `MethodError` unless an option is a finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise MethodError(f"{name} must be a finite number, not {value!r}.")


def option_names(method: type[Method]) -> list[str]:
    """The options that a method takes."""
    return [one.name for one in fields(method)]
