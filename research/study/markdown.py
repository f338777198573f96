"""Tables of a study's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .cells import Arm
from .results import Results, quality

SCORES: Mapping[str, str] = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "obeyed": "as asked",
    "drift": "drift",
}
"""What is shown of each arm, and its heading. "As asked" is known on the small base alone."""


def arms_table(arms: Sequence[Arm], results: Results, more: Mapping[str, Callable[[Arm], str]] | None = None) -> str:
    """A Markdown table: a row for each arm; means with intervals over subjects and seeds, `quality` the last."""
    shown = [what for what in SCORES if any(results.found(arm, what) for arm in arms)]
    heads = ["", *(SCORES[what] for what in shown), "quality", *(more or {})]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for arm in arms:
        row = [arm.label, *(str(results.estimate(arm, what)) for what in shown), str(quality(results, arm))]
        if failures := results.diverged(arm):
            row[0] += f" ({failures} diverged)"
        lines.append(f"| {' | '.join([*row, *(of(arm) for of in (more or {}).values())])} |")
    return "\n".join(lines)


def difference_table(arms: Sequence[Arm], other: Arm, results: Results) -> str:
    """A Markdown table of each arm's scores minus another's, subject by subject and seed by seed."""
    shown = [what for what in SCORES if results.found(other, what)]
    lines = [f"| minus {other.label} | {' | '.join(SCORES[what] for what in shown)} |", "|" + "---|" * (len(shown) + 1)]
    for arm in arms:
        values = [str(results.difference(arm, other, what)) for what in shown]
        lines.append(f"| {arm.label} | {' | '.join(values)} |")
    return "\n".join(lines)


def number(results: Results, what: str, form: str, unit: float = 1.0) -> Callable[[Arm], str]:
    """Of an arm's cells the mean of a number, for `arms_table`; the base alone has no costs.

    Args:
        results: of the study.
        what: the number's name.
        form: to write it in, such as ",.0f".
        unit: to divide it by.
    """

    def shown(arm: Arm) -> str:
        found = results.estimate(arm, what)
        return format(found.mean / unit, form) if found.count else "–"

    return shown


def learning_rate(arm: Arm) -> str:
    """An arm's, for `arms_table`; the base alone has none."""
    rate = arm.spec.training.get("learning_rate")
    return "–" if rate is None else f"{rate:g}"
