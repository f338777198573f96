"""What is loaded, and when: each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import diffusekrona
from diffusekrona import KronAConfig, save_krona

COMMAND = Path(sys.executable).with_name("diffusekrona")
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "matplotlib"}


def python(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)


def loaded(errors: str) -> set[str]:
    """The packages that `-X importtime` tells of."""
    lines = [line for line in errors.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("start", [("-m", "diffusekrona.cli"), (COMMAND,)], ids=str)
@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "Teach a base model"),
        (["train", "--help"], 0, "--max-train-steps"),
        (["train", "--nonsense", "1"], 2, "No such option"),
        (["evaluate", "--nonsense", "1"], 2, "No such option"),
        (["nonsense"], 2, "No such command"),
        (["convert"], 2, "Missing argument"),
    ],
    ids=str,
)
def test_help_and_a_mistake_in_a_command_line_need_no_model_library(
    start: tuple[object, ...], arguments: list[str], code: int, text: str
) -> None:
    done = python("-X", "importtime", *start, *arguments)
    assert done.returncode == code, done.stderr
    assert text in done.stdout + done.stderr
    found = loaded(done.stderr)
    assert {"typer", "pydantic", "diffusekrona"} <= found
    assert not HEAVY & found


def test_a_script_that_imports_the_library_has_it_in_pefts_tables_and_loads_nothing_else() -> None:
    program = """
import sys
import peft
before = {name.partition(".")[0] for name in sys.modules}
import diffusekrona
print(peft.PEFT_TYPE_TO_TUNER_MAPPING["KRONA"].__name__)
print(*sorted({name.partition(".")[0] for name in sys.modules} - before))
"""
    method, others = python("-c", program).stdout.splitlines()
    assert method == "KronAModel"
    assert set(others.split()) - sys.stdlib_module_names == {"diffusekrona"}


def test_a_process_that_is_taken_for_the_command_has_the_same_names() -> None:
    program = """
import sys
sys.argv = ["diffusekrona"]
import diffusekrona
print("peft" in sys.modules)
from diffusekrona import KronAConfig, load_krona
import peft
print(peft.PEFT_TYPE_TO_CONFIG_MAPPING["KRONA"] is KronAConfig, load_krona.__name__)
"""
    assert python("-c", program).stdout.splitlines() == ["False", "True load_krona"]


def test_the_command_reads_our_own_files_without_anything_else_of_the_library(tmp_path: Path) -> None:
    layer = torch.nn.ModuleDict({"to_q": torch.nn.Linear(64, 64)})
    save_krona(get_peft_model(layer, KronAConfig(target_modules=["to_q"])), tmp_path / "adapter")
    done = python("-m", "diffusekrona.cli", "inspect", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert "KronA, 1 layers" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "whole", "command"),
    [
        (["/bin/diffusekrona", "train"], ["python", "/bin/diffusekrona", "train"], True),
        (["diffusekrona.exe"], ["diffusekrona.exe"], True),
        (["-m", "--help"], ["python", "-m", "diffusekrona.cli", "--help"], True),
        (["-m"], ["python", "-X", "dev", "-m", "diffusekrona.cli"], True),
        (["-m"], ["python", "-m", "diffusekrona_plugin"], False),
        (["my_diffusekrona.py"], ["python", "my_diffusekrona.py"], False),
        (["-c"], ["python", "-c", "import diffusekrona"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_the_command_is_known_by_how_the_process_was_started(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], whole: list[str], command: bool
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "orig_argv", whole)
    assert diffusekrona._started_as_the_command() is command
