"""Draws docs/kronecker.svg, A ⊗ B in one picture: `python docs/kronecker.py`, from the repository's root."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

A = np.array([[1.0, -0.5, 0.25], [-0.75, 1.0, 0.4]])
B = np.array([[1.0, 0.3], [-0.6, 0.8], [0.2, -1.0]])
COLOURS = plt.get_cmap("RdBu_r")
LINES = ("#1b7837", "#762a83")


def draw(axes: Axes, matrix: np.ndarray, left: float, top: float, title: str, below: str) -> None:
    """One square a number, its colour the number's sign and size."""
    rows, columns = matrix.shape
    for i, j in np.ndindex(matrix.shape):
        colour = COLOURS(0.5 + 0.45 * matrix[i, j])
        axes.add_patch(Rectangle((left + j, -top - i - 1), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
    axes.text(left + columns / 2, -top + 0.35, title, ha="center", va="bottom", fontsize=12)
    axes.text(left + columns / 2, -top - rows - 0.35, below, ha="center", va="top", fontsize=9, linespacing=1.4)


def outline(axes: Axes, left: float, top: float, columns: int, rows: int, colour: str) -> None:
    """A frame around a block."""
    axes.add_patch(Rectangle((left, -top - rows), columns, rows, fill=False, edgecolor=colour, linewidth=2.5))


plt.rcParams.update({"svg.hashsalt": "kronecker", "svg.fonttype": "path", "font.family": "DejaVu Sans"})
figure, axes = plt.subplots(figsize=(9.2, 4.2))
draw(axes, A, 0, 2, "A", "a1 × a2\nSDXL: 4 × 64\n256 numbers")
draw(axes, B, 5.5, 1.5, "B", "b1 × b2\nSDXL: 320 × 20\n6,400 numbers")
draw(axes, np.kron(A, B), 10.5, 0, "ΔW = A ⊗ B", "a1·b1 × a2·b2\nSDXL: 1280 × 1280\n1,638,400 numbers, rank up to 80")
for sign, x in (("⊗", 4.25), ("=", 9.0)):
    axes.text(x, -3, sign, ha="center", va="center", fontsize=20)
for (i, j), colour in zip(((0, 0), (1, 2)), LINES, strict=True):
    outline(axes, j, 2 + i, 1, 1, colour)
    outline(axes, 10.5 + j * B.shape[1], i * B.shape[0], B.shape[1], B.shape[0], colour)
outline(axes, 5.5, 1.5, B.shape[1], B.shape[0], "#404040")
axes.set(xlim=(-0.9, 17.4), ylim=(-7.9, 1.2), aspect="equal")
axes.axis("off")
figure.savefig("docs/kronecker.svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
