"""What a run of each file in `examples/settings` would take, as `--plan` counts it: `python -m benchmarks.plans`.

Four pictures of a subject, and the published sizes of each base without its weights (`benchmarks/published.py`).
Memory is what is on the device at the peak, without what the driver and the libraries take for themselves. Writes
`benchmarks/results/plans.md`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from diffusekrona.training.plan import Plan, plan
from diffusekrona.training.settings import Settings, read_settings

from .published import write_configs

SETTINGS = Path(__file__).parents[1] / "examples" / "settings"
RESULTS = Path(__file__).parent / "results"
RECIPES = {
    "sd15.yaml": "sd15",
    "sd15-small.yaml": "sd15",
    "sdxl.yaml": "sdxl",
    "sdxl-12gb.yaml": "sdxl",
    "sd35.yaml": "sd35",
    "flux.yaml": "flux",
    "flux2.yaml": "flux2",
    "klein.yaml": "klein",
    "flux2-klein-12gb.yaml": "klein",
    "chroma.yaml": "chroma",
    "z-image.yaml": "z-image",
    "qwen-image.yaml": "qwen-image",
    "qwen-image-24gb.yaml": "qwen-image",
    "krea2.yaml": "krea2",
    "sana.yaml": "sana",
    "pixart.yaml": "pixart",
    "wan.yaml": "wan",
}
"""A file of settings, and its base in `benchmarks/published.py`."""


def planned(recipe: str, folder: Path) -> tuple[Settings, Plan]:
    """The settings of a file and their plan; what it reads is written into a new folder."""
    base = write_configs(RECIPES[recipe], folder / "base")
    (folder / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (1024, 1024)).save(folder / "images" / f"{number}.png")
    places = {"pretrained_model_name_or_path": str(base), "instance_data_dir": folder / "images"}
    settings = Settings.of({**read_settings(SETTINGS / recipe), **places, "output_dir": folder / "out"})
    return settings, plan(settings)


def main() -> None:
    """Count, print and write."""
    lines = [
        __doc__ or "",
        "| settings | parameters | before the steps, GB | in a step, GB | of it frozen | kept for the backward pass |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            found = planned(recipe, Path(folder))[1]
        step = found.weights + found.state + found.activations
        parts = (found.encoders, step, found.weights, found.activations, found.drawing, found.memory)
        lines.append(f"| {recipe} | {found.parameters:,} | " + " | ".join(f"{part / 1e9:.1f}" for part in parts) + " |")
        print(lines[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plans.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
