"""What is published: the sdist, the wheel that is built from it, and what they need."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusekrona

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
META = "diffusekrona-0.1.0.dist-info"


def python(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_distributions(tmp_path: Path) -> None:
    python("build", "--no-isolation", "--outdir", tmp_path)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    python("twine", "check", "--strict", sdist, wheel)

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"{META}/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"diffusekrona", META}
    assert {"diffusekrona/py.typed", f"{META}/licenses/LICENSE", f"{META}/licenses/NOTICE"} <= set(names)
    assert "\nLicense-Expression: Apache-2.0\n" in metadata

    with tarfile.open(sdist) as archive:
        rooms = {member.name.split("/")[1] for member in archive}
    assert {"src", "tests", "constraints.txt"} <= rooms
    assert "models" not in rooms


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def names(requirements: list[str]) -> set[str]:
    """Of distributions."""
    return {re.split(r"[<>=; [\]]", requirement)[0] for requirement in requirements}


def imported() -> set[str]:
    """All packages that the library's files import, but for Python's own and those that only type checkers need."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"diffusekrona", "tomllib", "typing_extensions"}


def test_the_version_is_the_installed_one_and_the_projects() -> None:
    assert diffusekrona.__version__ == version("diffusekrona") == project()["version"]


def test_each_package_that_is_imported_is_required_and_no_other_is() -> None:
    distributions = {
        "PIL": "pillow",
        "lycoris": "lycoris-lora",
        "pillow_heif": "pillow-heif",
        "pytorch_optimizer": "pytorch-optimizer",
        "yaml": "pyyaml",
    }
    extras = project()["optional-dependencies"]
    needed = {distributions.get(name, name) for name in imported()}
    # By torch.utils.tensorboard, and by name where an optimizer is of that package.
    loaded_otherwise = {"tensorboard", "prodigyopt", "pytorch-optimizer"}
    optional = names(extras["train"] + extras["quantized"] + extras["lycoris"] + extras["serve"]) | {"wandb"}
    assert names(project()["dependencies"]) == needed - optional
    assert names(extras["train"]) <= needed | loaded_otherwise


def test_the_readme_lists_what_is_required() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Install")[2].partition("\n## ")[0]
    _, needs, train = re.split(r"The library needs|The extra `train` adds", " ".join(text.split()))
    fillers = {"and", "the", "command", "line", "before", "ython"}

    def listed(sentence: str) -> set[str]:
        return set(re.findall(r"[a-z_]+(?:-[a-z]+)*", sentence)) - fillers

    assert listed(needs) == names(project()["dependencies"])
    assert listed(train.partition(".")[0]) == names(project()["optional-dependencies"]["train"])


def test_the_tests_have_all_that_the_extras_bring() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (_, recipe) = makefile.split(".venv/extras: .venv/ready")
    installed = re.findall(r"'\.\[(.*)\]'", recipe)[0].split(",")
    assert set(installed) == project()["optional-dependencies"].keys() - {"docs"}
    assert "matplotlib" in names(project()["optional-dependencies"]["dev"])  # which research needs
