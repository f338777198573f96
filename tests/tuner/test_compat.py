"""Names that libraries keep private are used in one place."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "diffusekrona"
LIBRARIES = ("peft", "torch", "diffusers", "accelerate", "transformers")
# PEFT exports its tuners' classes, and nothing of what a tuner is made of.
PRIVATE_MODULES = ("peft.", "torch._", "diffusers.models.attention", "accelerate.utils.environment")
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.name not in ("compat.py", "mixed.py"))


def private_imports(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] in LIBRARIES:
            module = str(node.module)
            private = f"{module}.".startswith(PRIVATE_MODULES) and module != "peft"
            found += [f"{module}.{one.name}" for one in node.names if private or one.name.startswith("_")]
        elif isinstance(node, ast.Import):
            found += [one.name for one in node.names if one.name.startswith(PRIVATE_MODULES)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_file_imports_what_is_not_public(path: Path) -> None:
    assert private_imports(path.read_text(encoding="utf-8")) == []


def test_such_imports_are_found() -> None:
    text = (
        "import peft.mapping\nfrom peft.utils.other import get_pattern_key\nfrom torch.nn import _x\nfrom peft import X"
    )
    assert private_imports(text) == ["peft.mapping", "peft.utils.other.get_pattern_key", "torch.nn._x"]
