"""Pictures of the run's progress: the same prompts and seeds every so many steps, all on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..generation import generate_images
from ..storage import write_whole
from .drawing import ready_to_draw
from .pictures import figure_png, image_png


class Validation:
    """Draws validation prompts with a pipeline in training, and keeps all that was drawn.

    Pictures are files `step-00000100-0.png`; those of steps before a resumed run are on the sheet again.

    Args:
        pipe: the pipeline.
        prompts: one picture of each.
        folder: of the pictures and of the sheet, `sheet.png`; without it, nothing is kept.
        seed: of all pictures.
        steps: denoising steps.
        guidance_scale: how closely to follow the prompt.
    """

    def __init__(
        self, pipe: Any, prompts: Sequence[str], folder: Path | None, *, seed: int, steps: int, guidance_scale: float
    ) -> None:
        self._pipe, self._prompts, self._folder, self._seed = pipe, list(prompts), folder, seed
        self._options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}

    def draw(self, step: int) -> list[Image.Image]:
        """Draw all prompts after a step, and the sheet anew."""
        images = self._drawn_prompts()
        if self._folder is not None:
            write_whole({_file(self._folder, step, number): image_png(image) for number, image in enumerate(images)})
            write_whole({self._folder / "sheet.png": self._drawn_sheet(self._folder)})
        return images

    def _drawn_prompts(self) -> list[Image.Image]:
        with ready_to_draw(self._pipe):
            return generate_images(self._pipe, self._prompts, self._seed, **self._options)

    def _drawn_sheet(self, folder: Path) -> bytes:
        """A row for each step and a column for each prompt."""
        from matplotlib.figure import Figure  # which takes 26 MB: only where something is drawn

        steps = sorted({int(path.name.split("-")[1]) for path in folder.glob("step-*-*.png")})
        columns = range(len(self._prompts))
        figure = Figure(figsize=(2.2 * len(columns) + 0.6, 2.2 * len(steps) + 0.5), layout="constrained")
        grid = figure.subplots(len(steps), len(columns), squeeze=False)
        for row, step in zip(grid, steps, strict=True):
            for column, axes in zip(columns, row, strict=True):
                if (file := _file(folder, step, column)).is_file():
                    with Image.open(file) as image:
                        axes.imshow(image)
                axes.set(xticks=[], yticks=[])
            row[0].set_ylabel(f"step {step}")
        for prompt, axes in zip(self._prompts, grid[0], strict=True):
            axes.set_title(prompt, fontsize=8, wrap=True)
        return figure_png(figure)


def _file(folder: Path, step: int, number: int) -> Path:
    return folder / f"step-{step:08d}-{number}.png"
