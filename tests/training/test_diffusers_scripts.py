"""Diffusers' own scripts with the changes of `docs/training-scripts.md`: killed and resumed, they train the same.

`DIFFUSERS_EXAMPLES=PATH pytest tests/training/test_diffusers_scripts.py`, where PATH is the folder `examples` of a
clone of https://github.com/huggingface/diffusers. Where torchvision is not installed, a stand-in does its part.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.training.runs import pictures, same

ROOT = Path(__file__).parents[2]
EXAMPLES = os.environ.get("DIFFUSERS_EXAMPLES")
SDXL, FLUX = "train_dreambooth_lora_sdxl.py", "train_dreambooth_lora_flux.py"
TEXT_TO_IMAGE = "train_text_to_image_lora_sdxl.py"
DENOISER_LINES, TEXT_ENCODER_LINES = 6, {SDXL: 0, FLUX: 1, TEXT_TO_IMAGE: 2}
STEPS, SAVED_AT = 5, 2
DRAWING = ["--validation_prompt", "a sks toy", "--num_validation_images", "1", "--validation_epochs", "100"]
"""In the first epoch, and at the end."""
UNCLIPPED = ["--max_grad_norm", "1e9"]
"""FLUX's script clips with the gradients of embeddings that it sums up over all steps, and forgets on resuming."""
RUNS = [
    (SDXL, []),
    (SDXL, ["--train_text_encoder"]),
    (FLUX, []),
    (FLUX, ["--train_text_encoder", *UNCLIPPED]),
    (FLUX, ["--train_text_encoder", "--mixed_precision", "bf16", *UNCLIPPED]),
    (TEXT_TO_IMAGE, ["--train_text_encoder"]),
]

DIFFS = {
    str(re.search(r"^\+\+\+ b/(.*)$", block, re.M)[1]): block  # type: ignore[index]
    for block in re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "training-scripts.md").read_text(), re.S)
}


@pytest.mark.parametrize("name", DIFFS)
def test_as_few_lines_change_as_the_page_says(name):
    lines = DIFFS[name].splitlines()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in lines if line.startswith("-") and not line.startswith("---")]
    assert len(added) == DENOISER_LINES + TEXT_ENCODER_LINES[name]
    assert len(removed) < len(added)


def start(script: Path, *options: str) -> None:
    """Run a script in this process, which is one of its own."""
    if find_spec("torchvision") is None:
        from benchmarks.torchvision_stand_in import install

        install()
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name="__main__")


def script_with_changes(name: str, options: list[str], folder: Path) -> Path:
    found = next(Path(str(EXAMPLES)).rglob(name), None)
    if found is None:
        pytest.skip(f"{EXAMPLES} has no {name}")
    script = folder / name
    script.write_text(found.read_text())
    subprocess.run(["git", "apply", "-"], cwd=folder, input=DIFFS[name], text=True, check=True)
    if "bf16" in options:  # the line more that the page asks for
        script.write_text(script.read_text().replace("accelerator.device, dtype=torch_dtype)", "accelerator.device)"))
    return script


def save_base_and_images(name: str, folder: Path) -> None:
    from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline

    (tiny_flux_pipeline if name == FLUX else tiny_sdxl_pipeline)().save_pretrained(folder / "base")
    (folder / "images").mkdir()
    pictures(1)[0].save(folder / "images" / "1.png")
    if name == TEXT_TO_IMAGE:
        text = json.dumps({"file_name": "1.png", "text": "a sks toy"})
        (folder / "images" / "metadata.jsonl").write_text(text)


def process(script: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    base, images = script.parent / "base", script.parent / "images"
    data = {"train_data_dir": images} if script.name == TEXT_TO_IMAGE else {"instance_data_dir": images}
    if script.name != TEXT_TO_IMAGE:
        data["instance_prompt"] = "a sks toy"  # type: ignore[assignment]
    every = {
        **data, "pretrained_model_name_or_path": base, "output_dir": output, "resolution": 32, "seed": 0,
        "max_train_steps": STEPS, "checkpointing_steps": SAVED_AT, "train_batch_size": 1, "learning_rate": 1e-2,
    }  # fmt: skip
    flags = [text for key, value in every.items() for text in (f"--{key}", str(value))]
    code = f"from tests.training.test_diffusers_scripts import start; start(*{[str(script), *flags, *options]!r})"
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(script.parent / "cache"), "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=script.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(script: Path, output: Path, *options: str) -> str:
    running = process(script, output, *options)
    text, _ = running.communicate()
    assert running.returncode == 0, text[-5000:]
    return text


def kill_after_a_checkpoint(script: Path, output: Path, *options: str) -> None:
    running = process(script, output, *options)
    last = output / f"checkpoint-{SAVED_AT}" / "random_states_0.pkl"
    while running.poll() is None and not last.is_file():
        time.sleep(0.01)
    time.sleep(0.1)  # until it is written
    running.kill()
    text, _ = running.communicate()
    assert last.is_file(), text[-5000:]
    assert not (output / f"checkpoint-{2 * SAVED_AT}").exists()


def adapter(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.name}.{key}": tensor
        for file in folder.glob("*/adapter_model.safetensors")
        for key, tensor in load_file(file).items()
    }


@pytest.mark.slow
@pytest.mark.skipif(not EXAMPLES, reason="DIFFUSERS_EXAMPLES does not name Diffusers' folder examples")
@pytest.mark.parametrize(("name", "options"), RUNS)
def test_a_script_that_is_killed_and_resumed_trains_the_same(name, options, tmp_path):
    from diffusers import DiffusionPipeline

    from diffusekrona import load_krona

    script = script_with_changes(name, options, tmp_path)
    save_base_and_images(name, tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(script, whole, *options)
    kill_after_a_checkpoint(script, killed, *options, *DRAWING)
    text = run(script, killed, *options, *DRAWING, "--resume_from_checkpoint", "latest")
    assert f"Resuming from checkpoint checkpoint-{SAVED_AT}" in text
    assert text.count("Running validation") == 1  # at the end
    for place in (".", f"checkpoint-{SAVED_AT}", f"checkpoint-{2 * SAVED_AT}"):
        assert same(adapter(whole / place), adapter(killed / place))
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
        load_krona(pipe, killed / place)
    assert not same(adapter(whole), adapter(whole / f"checkpoint-{SAVED_AT}"))
    assert not list(killed.rglob("pytorch_lora_weights*"))
