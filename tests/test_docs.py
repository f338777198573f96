"""The documentation holds: links lead somewhere, commands exist, code runs, and every room is on the map."""

from __future__ import annotations

import base64
import doctest
import importlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import typer.main
from nbclient import NotebookClient
from peft import LoraConfig
from PIL import Image

from diffusekrona import KronAConfig, inject_krona, load_krona, save_krona, unload_krona
from diffusekrona.cli import app
from diffusekrona.training import families
from research.study.studies import STUDIES
from tests.pipelines import tiny_sdxl_pipeline

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "diffusekrona"
ROOMS = ("docs", "recipes", "studies", "benchmarks", "examples")
IN_ROOMS = [page for room in ROOMS for page in sorted((ROOT / room).rglob("*.md")) if ".cache" not in page.parts]
PAGES = [*sorted(ROOT.glob("*.md")), *IN_ROOMS]
HAND_WRITTEN = [page for page in PAGES if "results" not in page.parts]
NOTEBOOK = ROOT / "examples" / "first_adapter.ipynb"

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="docs/ is not in this copy of the repository")

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNS = re.compile(r"^<!-- runs -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def in_repository(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Links


@pytest.mark.parametrize("page", PAGES, ids=in_repository)
def test_relative_links_lead_to_files(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\((?!\w+:|#)([^)\s#]+)(?:#[^)\s]*)?\)", text)
    assert [target for target in targets if not (page.parent / target).is_file()] == []


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], ids=in_repository)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    inline = re.findall(r"`([^`\s]+)`", FENCED.sub("", page.read_text(encoding="utf-8")))
    named = [path for path in inline if re.match(r"(tests|research|recipes|studies|docs|benchmarks|models)/", path)]
    named += [
        f"src/diffusekrona/{path}" for path in inline if re.match(r"(kron|tuner|files|training|evaluation|cli)/", path)
    ]
    assert [path for path in named if not (ROOT / path).exists()] == []


# Commands


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command that a page shows, in a block or within a line, with the page's name, in words."""
    for page in HAND_WRITTEN:
        text = page.read_text(encoding="utf-8")
        blocks = [code for language, code in FENCED.findall(text) if language == "bash"]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        inline = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
        for line in [*lines, *inline]:
            if re.match(r"(diffusekrona|python -m|accelerate launch|make) ", line):
                yield in_repository(page), shlex.split(line, comments=True)


def test_commands_and_their_flags_exist() -> None:
    known: Any = typer.main.get_command(app)
    seen = 0
    for page, words in commands():
        if words[:4] == ["accelerate", "launch", "-m", "diffusekrona.cli"]:
            words = ["diffusekrona", *words[4:]]
        if words[0] != "diffusekrona" or words[1].startswith("-"):
            continue
        seen += 1
        assert words[1] in known.commands, (page, words)
        flags = {flag for one in known.commands[words[1]].params for flag in [*one.opts, *one.secondary_opts]}
        asked = {word.split("=")[0].replace("_", "-") for word in words[2:] if word.startswith("--")}
        assert asked <= flags | {"--help"}, (page, words)
    assert seen > 20


def test_modules_that_are_run_and_targets_that_are_made_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page, words in commands():
        if words[:2] == ["python", "-m"]:
            path = ROOT / words[2].replace(".", "/")
            assert (path / "__main__.py").is_file() or path.with_suffix(".py").is_file(), (page, words)
        if words[:3] == ["python", "-m", "research.study"]:
            assert {*words[3:4]} <= {*STUDIES, "tables", "NAME"}, (page, words)
        if words[0] == "make":
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:]), (page, words)


@pytest.mark.parametrize("name", ["training", "families", "generating", "factors", "merging", "evaluation"])
def test_flags_named_in_a_task_page_exist(name: str) -> None:
    known: Any = typer.main.get_command(app)
    options = [option for command in known.commands.values() for option in command.params]
    flags = {flag for option in options for flag in [*option.opts, *option.secondary_opts]}
    text = FENCED.sub("", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"))
    shown = [code for code in re.findall(r"`([^`\n]+)`", text) if not code.startswith("python")]
    named = {flag.replace("_", "-") for code in shown for flag in re.findall(r"(?<!\S)--[\w-]+", code)}
    assert named - flags - {"--help"} == set()


# Code


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages' code takes for granted, for a tiny pipeline."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("my-dog", "my-style", "my-cat"):
        pipe = tiny_sdxl_pipeline()
        inject_krona(pipe, KronAConfig(init_weights=False))
        save_krona(pipe, folder / name)
    save_krona(pipe, folder / "somebodys-lokr.safetensors", format="lokr")
    lora = tiny_sdxl_pipeline()
    lora.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    lora.unet.save_lora_adapter(folder, weight_name="somebodys-lora.safetensors")
    (folder / "my-dog-pictures").mkdir()
    for colour in ("red", "green"):
        Image.new("RGB", (40, 40), colour).save(folder / "my-dog-pictures" / f"{colour}.png")
    return folder


BLOCKS = [
    pytest.param(code, id=f"{in_repository(page)}-{index}")
    for page in HAND_WRITTEN
    for index, code in enumerate(RUNS.findall(page.read_text(encoding="utf-8")))
]


def test_every_task_has_code_that_runs() -> None:
    pages = {str(block.id).rsplit("-", 1)[0] for block in BLOCKS}
    tasks = ("training", "families", "generating", "sharing", "merging", "factors")
    assert {"README.md", *(f"docs/{task}.md" for task in tasks)} <= pages


@pytest.mark.parametrize("code", BLOCKS)
def test_code_runs(code: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr(families, "_FAMILIES", [*families._FAMILIES])
    quicker = code.replace("num_inference_steps=30", "num_inference_steps=1")
    exec(compile(quicker, "page", "exec"), {"pipe": tiny_sdxl_pipeline(), "torch": torch})


DOCTESTED = [path for path in sorted(SOURCES.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", DOCTESTED, ids=in_repository)
def test_examples_in_docstrings(path: Path) -> None:
    name = ".".join(path.relative_to(SOURCES.parent).with_suffix("").parts).removesuffix(".__init__")
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted > 0
    assert outcome.failed == 0


# The notebook


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models").is_dir(), reason="the base model is not in this copy of the repository")
def test_the_notebook_runs_and_shows_the_pictures_that_it_was_committed_with(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = [len(pictures(cell)) for cell in notebook.cells]
    for room in ("models", "examples"):
        (tmp_path / room).symlink_to(ROOT / room)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [len(pictures(cell)) for cell in notebook.cells] == committed
    subject, base, adapted, merged = (picture for cell in notebook.cells for picture in pictures(cell))
    assert subject.shape == base.shape
    assert np.abs(adapted - base).mean() > 10, "the adapter changes the pictures"
    assert np.abs(adapted - merged).max() <= 3, "merging does not, but for rounding"


def pictures(cell: Any) -> list[np.ndarray]:
    """The pictures below a cell, each height × width × 3, in levels from 0 to 255."""
    encoded = [output.data["image/png"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    opened = (Image.open(io.BytesIO(base64.b64decode(text))) for text in encoded)
    return [np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in opened]


# The map


def test_the_map_names_every_room_and_no_other() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ours, outside = text.split("Outside the wheel:")
    assert rooms_named(ours) == rooms(SOURCES)
    beside = rooms_named(outside.split("## Tests")[0])
    assert {f"research/{name}" for name in rooms(ROOT / "research")} <= beside
    assert [name for name in beside if not (ROOT / name).exists()] == []


def rooms_named(table: str) -> set[str]:
    return {
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`([\w./]+)`", row)
    }


def rooms(folder: Path) -> set[str]:
    """Folders of Python, with a slash, and modules."""
    folders = {f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").is_file()}
    return folders | {path.name for path in folder.glob("*.py") if not path.name.startswith("__")}


# The walks


@pytest.fixture(scope="module")
def walks() -> list[list[tuple[str, str]]]:
    """The files and functions of each walk, in order."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("### Two walks\n")[1].split("\nA new ")[0]
    steps: list[list[tuple[str, str]]] = []
    for number, file, names in re.findall(r"^(\d+)\. `([\w/]+\.py)`: (.*)$", section, re.MULTILINE):
        if number == "1":
            steps.append([])
        steps[-1].append((file, re.findall(r"`(\w+)`", names)[0]))
    return steps


def entered(act: Callable[[], object]) -> list[tuple[str, str]]:
    """The files and functions of ours that a call enters, each once, in order; a class by its first method."""
    found: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(SOURCES):
            holder = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else ""
            for name in (frame.f_code.co_name, holder):
                found.setdefault((path.relative_to(SOURCES).as_posix(), name))

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return list(found)


def test_a_lokr_file_takes_the_walk_that_is_described(walks: list[list[tuple[str, str]]], tmp_path: Path) -> None:
    pipe = tiny_sdxl_pipeline()
    inject_krona(pipe, KronAConfig(a1=4, a2=4, init_weights=False))
    save_krona(pipe, tmp_path / "adapter.safetensors", format="kohya")
    unload_krona(pipe)
    passed = entered(lambda: load_krona(pipe, tmp_path / "adapter.safetensors"))
    assert [passed.index(step) for step in walks[0]] == sorted(passed.index(step) for step in walks[0])
    assert len({file for file, _ in walks[0]}) <= 10


def test_an_input_takes_the_walk_that_is_described(walks: list[list[tuple[str, str]]]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    inject_krona(model, KronAConfig(a1=4, a2=8, target_modules=["0"]))
    passed = entered(lambda: model(torch.ones(3, 64)).sum().backward())
    assert [passed.index(step) for step in walks[1]] == sorted(passed.index(step) for step in walks[1])
