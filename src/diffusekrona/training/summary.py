"""What is left of a run for people: a page of its settings, loss and pictures, and a model card."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .pictures import figure_png

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
        losses: one per step; NaN where it was skipped.
        sheet: the picture of validations; left out where there is none.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table(facts),
        "<h2>Again</h2>",
        f"<pre>{html.escape(command)}</pre>",
        "<h2>Loss</h2>",
        _picture(loss_curve(losses), "the loss over the steps"),
    ]
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


def model_card(base: str, prompt: str, class_name: str, facts: Mapping[str, object], names: Sequence[str]) -> str:
    """A model card in the hub's form.

    Args:
        base: the base model's name.
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
from diffusers import {class_name}
from diffusekrona import load_krona, merge_krona

pipe = {class_name}.from_pretrained({base!r})
load_krona(pipe, "this-folder")
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
