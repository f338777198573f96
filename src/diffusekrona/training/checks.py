"""What a setting may be, checked where it is made, with errors that name it."""

from __future__ import annotations

import math

from ..errors import TrainingConfigError


def check_whole(name: str, value: object, least: int) -> None:
    """Raise `TrainingConfigError` unless a value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TrainingConfigError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def check_number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> None:
    """Raise `TrainingConfigError` unless a value is a number within these limits."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not above < value < below or value < least:  # type: ignore[operator]
        start = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
        end = f" and below {below:g}" if below < math.inf else ""
        raise TrainingConfigError(f"{name} must be a finite number {start}{end}, not {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raise `TrainingConfigError` unless a value is true or false."""
    if not isinstance(value, bool):
        raise TrainingConfigError(f"{name} must be true or false, not {value!r}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `TrainingConfigError` unless a value is one of these."""
    if value not in choices:
        raise TrainingConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")
