"""What of a file cannot be used here: an error that names all of it, or a warning if the user wants the rest."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..errors import AdapterFileError, ConfigError

OnUnused = Literal["error", "warn"]
"""What to do about tensors of a file that cannot be used: refuse the file, or use the rest and warn."""

AlphaOfWhole = Literal["ignored", "applied"]
"""What a LoKr layer's alpha means where both factors are whole: nothing, or the scale alpha / rank of the header."""


@dataclass(frozen=True)
class Reading:
    """How to read a file where there is a choice.

    Attributes:
        on_unused: about tensors that cannot be used.
        alpha_of_whole: about LoKr layers of two whole factors, whose alpha LyCORIS, ComfyUI and Diffusers ignore and
            other programs divide by the rank in the header.

    Raises:
        ConfigError: there is no such choice.
    """

    on_unused: OnUnused = "error"
    alpha_of_whole: AlphaOfWhole = "ignored"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("on_unused", self.on_unused, get_args(OnUnused)),
            ("alpha_of_whole", self.alpha_of_whole, get_args(AlphaOfWhole)),
        ):
            if value not in choices:
                raise ConfigError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}.")


_SHOWN = 5

STRICT = Reading()
"""Where nothing is chosen."""


@dataclass
class Unused:
    """Collects what of a file cannot be used, for one error or warning.

    Attributes:
        source: what to call the file.
        on_unused: what to do about it.
        reasons: sentences that name tensors or layers, and say what they are.
    """

    source: str
    on_unused: OnUnused = "error"
    reasons: list[str] = field(default_factory=list)

    def add(self, reason: str) -> None:
        """Note a whole sentence that names the file, what cannot be used, and why."""
        self.reasons.append(reason)

    def report(self, used: int) -> None:
        """Raise or warn, if there is anything to say.

        Args:
            used: how many layers can be used; without any, this raises in any case.

        Raises:
            AdapterFileError: with all reasons, and the way to use the rest.
        """
        if not self.reasons:
            return
        text = " ".join(self.reasons[:_SHOWN])
        if len(self.reasons) > _SHOWN:
            text += f" And {len(self.reasons) - _SHOWN} more problems of the kind."
        if self.on_unused == "warn" and used:
            warnings.warn(f"{text} The other {used} layers are used.", UserWarning, stacklevel=2)
            return
        if used:
            text += (
                f" The other {used} layers can be used without them: on_unused='warn' does (--on-unused warn on the "
                "command line)."
            )
        raise AdapterFileError(text)


def few(names: Collection[str], shown: int = 3) -> str:
    """The first few of some names."""
    listed = list(names)
    return ", ".join(listed[:shown]) + (", …" if len(listed) > shown else "")
