"""Families that installed packages bring by an entry point."""

import importlib
import sys

import pytest

from diffusekrona.training import families as of_packages
from diffusekrona.training.families import StableDiffusion, families, family_of
from tests.pipelines import tiny_sd_pipeline

WORKING = """
from diffusekrona.training.families import StableDiffusion

class Own(StableDiffusion):
    NAME = "our own"
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs packages, each with a module and an entry point that names its `Own`."""
    of_packages._loaded.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[diffusekrona.families]\nof-{name} = {name}:Own\n")
        importlib.invalidate_caches()

    yield install
    of_packages._loaded.cache_clear()
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_packages_family_comes_before_ours(installed):
    installed("brought", WORKING)
    assert family_of(tiny_sd_pipeline()).NAME == "our own"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("raise OSError('no licence')", "OSError: no licence"),
        ("Other = 1", "AttributeError"),
        ("Own = dict", "TypeError: broken:Own is no subclass of Family"),
        ("Own = 1", "TypeError: broken:Own is no subclass of Family"),
    ],
)
def test_a_package_that_is_broken_is_named_once_and_costs_no_other_family(installed, caplog, source, told):
    installed("broken", source)
    installed("brought", WORKING)
    pipe = tiny_sd_pipeline()
    assert [family_of(pipe).NAME for _ in range(3)] == ["our own"] * 3
    assert StableDiffusion in families()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "The family of-broken of broken (broken:Own) is left out" in record.getMessage()
    assert told in record.getMessage()
