"""The demo's picture: the subject, and its name as the base and the personalised model draw it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def draw_picture(
    path: Path,
    subject: Sequence[Image.Image],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    backgrounds: Sequence[str],
) -> Path:
    """Write the picture as PNG and return its path.

    Args:
        path: of the PNG file.
        subject: the pictures that were trained on.
        before: the base's pictures, one per background, in as many rounds as there are seeds.
        after: the personalised model's, likewise.
        backgrounds: their names, the heads of the columns.
    """
    columns = len(backgrounds)
    rounds = len(after) // columns
    rows = [(f"the subject:\n{len(subject)} pictures", list(subject)[:columns])]
    rows += [("the base model", list(before)[:columns])]
    rows += [("with KronA" if not i else "", list(after)[i * columns :][:columns]) for i in range(rounds)]
    from matplotlib.figure import Figure  # which takes 26 MB: only where something is drawn

    figure = Figure(figsize=(1.25 * columns + 1.3, 1.32 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in enumerate(rows):
        for column, axis in enumerate(axes[row]):
            axis.set_axis_off()
            if column < len(images):
                axis.imshow(images[column], interpolation="bicubic")
            if row == 1 and column < len(images):
                axis.set_title(backgrounds[column], fontsize=9)
        axes[row][0].text(-0.12, 0.5, label, transform=axes[row][0].transAxes, ha="right", va="center", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
