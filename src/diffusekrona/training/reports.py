"""What a run shows of itself: validation pictures, trackers, a page of its settings and loss, and a model card."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..errors import TrainingConfigError
from ..generation import generate_images
from ..inputs.captions import write_metadata
from ..inputs.images import figure_png, image_png
from ..storage import write_whole
from .progress import TrainingStep
from .runtime import modes_kept
from .settings import ReportTo

_REPORTS = {
    "tensorboard": ["TensorBoard's files"],
    "matplotlib": ["the loss curve", "the sheet of pictures"],
}
"""What a run writes with each package that only the extra `train` brings."""


def left_out() -> str | None:
    """A line about what a run does not write here for want of packages; None where it writes everything."""
    missing = [package for package in _REPORTS if find_spec(package) is None]
    if not missing:
        return None
    *first, last = [part for package in missing for part in _REPORTS[package]]
    parts = f"{', '.join(first)} and {last}" if first else last
    return (
        f"This run leaves out {parts}, which need {' and '.join(missing)}. "
        "To have them, pip install 'diffusekrona[train]'."
    )


class Validation:
    """Draws validation prompts with a pipeline in training, and keeps all that was drawn.

    Pictures are files `step-00000100-0.png`; those of steps before a resumed run are on the sheet again.

    Args:
        pipe: the pipeline.
        prompts: one picture of each.
        folder: of the pictures and of the sheet, `sheet.png`; without it, nothing is kept.
        seed: of all pictures.
        steps: denoising steps.
        guidance_scale: how closely to follow the prompt; None as `generate_images` has it.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        folder: Path | None,
        *,
        seed: int,
        steps: int,
        guidance_scale: float | None,
    ) -> None:
        self._pipe, self._prompts, self._folder, self._seed = pipe, list(prompts), folder, seed
        self._options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}

    def draw(self, step: int) -> list[Image.Image]:
        """Draw all prompts after a step, and the sheet anew where matplotlib is installed."""
        images = self._drawn_prompts()
        if self._folder is not None:
            write_whole({_file(self._folder, step, number): image_png(image) for number, image in enumerate(images)})
            if find_spec("matplotlib") is not None:
                write_whole({self._folder / "sheet.png": self._drawn_sheet(self._folder)})
        return images

    def draw_asked(self, step: int, prompt: str) -> None:
        """Draw a prompt after a step; it is `asked-00000100-0.png`, and the folder's captions have its prompt."""
        if self._folder is None:
            return
        with ready_to_draw(self._pipe):
            image = generate_images(self._pipe, [prompt], self._seed, **self._options)[0]
        number = len(list(self._folder.glob(f"asked-{step:08d}-*.png")))
        file = self._folder / f"asked-{step:08d}-{number}.png"
        write_whole({file: image_png(image)})
        write_metadata(self._folder, {file.name: {"text": prompt}})

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
            axes.set_title(fill(prompt, 36), fontsize=8, parse_math=False)
        return figure_png(figure)


def _file(folder: Path, step: int, number: int) -> Path:
    return folder / f"step-{step:08d}-{number}.png"


@contextmanager
def ready_to_draw(pipe: Any, device: torch.device | None = None) -> Iterator[None]:
    """All of a pipeline's models on one device and without dropout; afterwards where and as they were.

    Args:
        pipe: some of its models may be elsewhere, such as encoders that have done their work.
        device: where to draw; by default where the first model is that is not on the CPU.
    """
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    homes = [(module, next(module.parameters()).device) for module in modules]
    elsewhere = (home for _, home in homes if home.type != "cpu")
    with modes_kept(modules):
        for module in modules:
            module.eval()
        pipe.to(device or next(elsewhere, torch.device("cpu")))
        try:
            yield
        finally:
            for module, home in homes:
                module.to(home)


class Trackers:
    """Where a run's progress is written.

    Args:
        folder: of TensorBoard's files, where it is installed; those of Weights & Biases go beside it.
        settings: of the run.
        report_to: "wandb" for Weights & Biases, too.
        resumed_at: the step that the run goes on from; what TensorBoard has of later ones is hidden.

    Raises:
        TrainingConfigError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], report_to: ReportTo, resumed_at: int = 0) -> None:
        self._board: Any = None
        self._wandb: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else None)
        if report_to == "wandb":
            if find_spec("wandb") is None:
                raise TrainingConfigError("report_to 'wandb' needs the package: pip install wandb.")
            import wandb

            self._wandb = wandb.init(project="diffusekrona", config=dict(settings), dir=str(folder.parent))

    def step(self, done: TrainingStep) -> None:
        """Write down a step."""
        values = {"loss": done.loss, "learning_rate": done.learning_rate, "images_per_second": done.images_per_second}
        if done.validation_loss is not None:
            values["validation_loss"] = done.validation_loss
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"train/{name}", value, done.step)
        if self._wandb is not None:
            self._wandb.log(values, step=done.step)

    def pictures(self, step: int, prompts: Sequence[str], images: Sequence[Image.Image]) -> None:
        """Write down validation pictures."""
        if self._board is not None:
            for number, image in enumerate(images):
                self._board.add_image(f"validation/{number}", np.asarray(image), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            pairs = zip(prompts, images, strict=True)
            self._wandb.log({"validation": [wandb.Image(image, caption=prompt) for prompt, image in pairs]}, step=step)

    def close(self) -> None:
        """Write what is still to be written."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td { padding: .1rem .8rem .1rem 0; vertical-align: top }
code, pre { background: #f3f3f3; padding: .1rem .3rem } pre { padding: .6rem; white-space: pre-wrap }
img { max-width: 100% }
"""


def run_page(
    title: str,
    command: str,
    facts: Mapping[str, object],
    settings: Mapping[str, Any],
    losses: Sequence[float],
    sheet: Path,
) -> str:
    """One HTML page, with its pictures in it.

    Args:
        title: heading.
        command: that repeats the run.
        facts: what came of it.
        settings: all of them.
        losses: one per step, drawn where matplotlib is installed; NaN where a step was skipped.
        sheet: the picture of validations; left out where there is none.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table(facts),
        "<h2>Again</h2>",
        f"<pre>{html.escape(command)}</pre>",
    ]
    if find_spec("matplotlib") is not None:
        parts += ["<h2>Loss</h2>", _picture(loss_curve(losses), "the loss over the steps")]
    if sheet.is_file():
        parts += ["<h2>Validation</h2>", _picture(sheet.read_bytes(), "validation prompts over the steps")]
    parts += ["<h2>Settings</h2>", _table(settings)]
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def loss_curve(losses: Sequence[float], window: int = 50) -> bytes:
    """A PNG of each step's loss and of the mean over some steps before it."""
    from matplotlib.figure import Figure  # which takes 26 MB: only where something is drawn

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(losses) + 1)
    means = [_mean(losses[max(0, step - window) : step]) for step in range(1, len(losses) + 1)]
    axes.plot(steps, losses, color="#c9d5e8", linewidth=0.8, label="each step")
    axes.plot(steps, means, color="#2b5797", linewidth=1.8, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    return figure_png(figure)


def _mean(losses: Sequence[float]) -> float:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def _table(rows: Mapping[str, object]) -> str:
    cells = (f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _picture(content: bytes, text: str) -> str:
    return f"<img alt='{html.escape(text)}' src='data:image/png;base64,{base64.b64encode(content).decode()}'>"


def model_card(
    base: str, adapter: str, prompt: str, class_name: str, facts: Mapping[str, object], names: Sequence[str]
) -> str:
    """A model card in the hub's form, with code that runs as it stands.

    Args:
        base: the base model, a hub id or a folder.
        adapter: where a reader finds the adapter, a hub id or a folder.
        prompt: of the subject.
        class_name: of the pipeline.
        facts: about the adapter and its training.
        names: the adapter's files.
    """
    header = {
        "base_model": base,
        "library_name": "diffusers",
        "instance_prompt": prompt,
        "pipeline_tag": "text-to-image",
    }
    lines = "\n".join(f"{name}: {_quoted(value)}" for name, value in header.items())
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
{lines}
tags:
- diffusekrona
- kronecker-adapter
- dreambooth
---

# {prompt}

A Kronecker adapter (ΔW = s · A ⊗ B) for `{base}`, trained with diffusekrona. Write **{prompt}** in a prompt to see it.

```python
import torch
from diffusers import {class_name}
from diffusekrona import load_krona, merge_krona

pipe = {class_name}.from_pretrained({base!r}, dtype=torch.float32)  # torch.bfloat16 on a GPU
load_krona(pipe, {adapter!r})
merge_krona(pipe)  # free from here on
image = pipe({prompt!r}).images[0]
```

| | |
|---|---|
{rows}

Files: {", ".join(f"`{name}`" for name in names)}.
"""


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
