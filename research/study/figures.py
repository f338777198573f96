"""Figures of studies: scores along an axis, or one beside another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from .cells import Arm
from .markdown import SCORES
from .results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#666666", "#17becf", "#000000")


def along(
    arms: Sequence[Arm],
    results: Results,
    axis: str,
    log: bool = True,
) -> Figure:
    """Scores over the arms' `x`, a line for each series, with 95% intervals."""
    from matplotlib.figure import Figure  # which takes 26 MB: only where something is drawn

    shown = [what for what in ("dino", "clip_t", "obeyed") if any(results.found(arm, what) for arm in arms)]
    figure = Figure(figsize=(3.6 * len(shown), 3.2), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, what in zip(panels, shown, strict=True):
        for number, series in enumerate(dict.fromkeys(arm.series for arm in arms)):
            line = sorted((arm for arm in arms if arm.series == series), key=lambda arm: arm.x or 0.0)
            found = [(arm.x, results.estimate(arm, what)) for arm in line if results.found(arm, what)]
            places = [x or 0.0 for x, _ in found]
            colour = COLOURS[number % len(COLOURS)]
            panel.plot(places, [value.mean for _, value in found], "o-", color=colour, label=series, markersize=3)
            panel.fill_between(
                places, [v.low for _, v in found], [v.high for _, v in found], color=colour, alpha=0.15, linewidth=0
            )
        panel.set(title=SCORES[what], xlabel=axis)
        if log:
            panel.set_xscale("log")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    return figure


def gallery(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str]) -> Figure:
    """Pictures in rows, with names beside the rows and over the columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * len(columns) + 1.5, 1.15 * len(rows) + 0.35), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image, interpolation="bicubic")
            panel.set(xticks=[], yticks=[])
        line[0].set_ylabel(fill(name, 20), fontsize=7, rotation=0, ha="right", va="center")
    for panel, column in zip(panels[0], columns, strict=True):
        panel.set_title(fill(column, 18), fontsize=7)
    return figure


def beside(name: str, arms: Sequence[Arm], results: Results, most: int = 6) -> dict[str, Figure]:
    """A study's pictures, a row for each arm, of up to so many prompts; none where they were not kept."""
    found = results.pictures(arms)
    if found is None:
        return {}
    prompts = list(found[0])
    shown = [prompts[number * len(prompts) // min(most, len(prompts))] for number in range(min(most, len(prompts)))]
    rows = {arm.label: [row[prompt] for prompt in shown] for arm, row in zip(arms, found, strict=True)}
    return {f"{name}-pictures": gallery(rows, [prompt.format("…") for prompt in shown])}


def against(arms: Sequence[Arm], results: Results) -> Figure:
    """Each arm as a point of fidelity and of how it follows the text, with 95% intervals: up and right is better."""
    from matplotlib.figure import Figure

    x, y = "obeyed" if any(results.found(arm, "obeyed") for arm in arms) else "clip_t", "dino"
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    panel = figure.subplots()
    for number, arm in enumerate(arms):
        across, up = results.estimate(arm, x), results.estimate(arm, y)
        panel.errorbar(
            across.mean,
            up.mean,
            xerr=[[across.mean - across.low], [across.high - across.mean]],
            yerr=[[up.mean - up.low], [up.high - up.mean]],
            fmt="os^Dv<>ph*"[number % 10],
            color=COLOURS[number % len(COLOURS)],
            label=arm.label,
            markersize=6,
            elinewidth=0.8,
        )
    panel.set(xlabel=SCORES[x], ylabel=SCORES[y])
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure
