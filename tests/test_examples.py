"""The scripts in examples/ run as a user would run them, against the repository's own base model."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from diffusekrona.training.settings import Settings, read_settings
from tests.training.processes import started

ROOT = Path(__file__).parents[1]
BASE = ROOT / "models" / "emoji-sdxl"

pytestmark = pytest.mark.skipif(not BASE.is_dir(), reason="the base model is not in this copy of the repository")


def run(folder: Path, script: str, *arguments: str) -> str:
    """What a script prints, run in a process that has the libraries already."""
    path = str(ROOT / "examples" / script)
    return printed_by(runpy.run_path, path, [path, "--base", str(BASE), *arguments], folder)


def printed_by(load: Callable[..., object], what: str, arguments: list[str], folder: Path) -> str:
    """What a program prints, in a process of its own."""
    printed = folder / "printed.txt"
    process = started(_run, load, what, arguments, printed)
    process.join()
    assert process.exitcode == 0, printed.read_text(encoding="utf-8")
    return printed.read_text(encoding="utf-8")


def _run(load: Callable[..., object], what: str, arguments: list[str], printed: Path) -> None:
    sys.argv = arguments
    with printed.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            load(what, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


def test_a_script_trains_and_saves_with_three_lines_and_another_generates_with_two(tmp_path: Path) -> None:
    adapter, picture = tmp_path / "my-toy", tmp_path / "picture.png"
    printed = run(
        tmp_path, "train.py", "--images", str(ROOT / "examples" / "toy-bear"), "--output", str(adapter), "--steps", "2"
    )
    assert "step 2: loss" in printed
    with safe_open(adapter / "unet" / "adapter_model.safetensors", framework="pt") as file:
        keys = list(file.keys())
        moved = [key for key in keys if key.endswith("krona_B") and file.get_tensor(key).any()]
    assert moved, "two steps of training leave no B at zero"
    run(
        tmp_path,
        "generate.py",
        "a sks toy on a red background",
        "--adapter",
        str(adapter),
        "--output",
        str(picture),
        "--steps",
        "2",
    )
    with Image.open(picture) as image:
        assert image.size == (64, 64)


def test_an_adapter_is_written_for_comfyui_and_a_lokr_file_is_generated_with(tmp_path: Path) -> None:
    adapter, lokr, picture = tmp_path / "my-toy", tmp_path / "lokr.safetensors", tmp_path / "picture.png"
    run(tmp_path, "train.py", "--images", str(ROOT / "examples" / "toy-bear"), "--output", str(adapter), "--steps", "1")
    assert "wrote" in run(tmp_path, "comfyui.py", "--adapter", str(adapter), "--output", str(lokr))
    with safe_open(lokr, framework="pt") as file:
        assert any(key.startswith("lora_unet_") and key.endswith(".lokr_w1") for key in file.keys())  # noqa: SIM118
    for file in (lokr, ROOT / "examples" / "toy-bear-lora"):
        printed = run(
            tmp_path, "load_lokr.py", "a sks toy", "--lokr", str(file), "--output", str(picture), "--steps", "1"
        )
        assert ("Merging it instead" in printed) == (file != lokr)
        with Image.open(picture) as image:
            assert image.size == (64, 64)
        picture.unlink()


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "settings").iterdir()), ids=lambda path: path.name)
def test_settings_can_be_trained_with(tmp_path: Path, file: Path) -> None:
    given = {"instance_data_dir": "images", "output_dir": "my-dog"}
    settings = Settings.of({**given, **read_settings(file)})
    assert settings.adapter.config().a1 == settings.adapter.a1
    if settings.data.pretrained_model_name_or_path == "models/emoji-sdxl":
        values = {"base": BASE, "images": ROOT / "examples" / "toy-bear", "output": tmp_path / "toy"}
        flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        arguments = ["diffusekrona", "train", "--config", str(file), *flags, "--plan"]
        printed = printed_by(runpy.run_module, "diffusekrona.cli", arguments, tmp_path)
        assert "344,736 (4.857% of the base's)" in printed


def test_a_lora_is_turned_into_kronecker_adapters_and_a_sheet_shows_them(tmp_path: Path) -> None:
    output = tmp_path / "out"
    printed = run(
        tmp_path, "lora_to_krona.py", "--output", str(output), "--shares", "0.2", "0.1", "--terms", "1", "--steps", "1"
    )
    assert printed.count("relative error 0.") == 2
    assert {path.name for path in output.iterdir()} == {"krona-0.2", "krona-0.1", "sheet.png"}
