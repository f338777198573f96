"""Names of adapters: keys of what is in a folder, or ids of the hub."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from diffusekrona.errors import AdapterFileError, AdapterNameError, KronAError
from diffusekrona.serving.listing import Listing


def test_files_and_folders_are_adapters_and_nothing_else(tmp_path: Path) -> None:
    for name in ("dog.safetensors", "notes.txt", ".dog.safetensors.1a.tmp", ".hidden.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "cat").mkdir()
    listing = Listing(tmp_path)
    assert listing.names() == ["cat", "dog"]
    assert listing.source("dog") == tmp_path / "dog.safetensors"
    assert listing.source("cat") == tmp_path / "cat"
    assert len(listing) == 2


@pytest.mark.parametrize(
    "name", ["../dog", "/etc/passwd", "dog.safetensors", "", ".", "..", "sub/../dog", "dog\0", "a/b"]
)
def test_a_name_is_no_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    for path in (tmp_path / "dog.safetensors", tmp_path / "inside" / "dog.safetensors"):
        path.touch()
    listing = Listing(tmp_path / "inside")
    assert name not in listing
    with pytest.raises(AdapterNameError, match="no adapter named"):
        listing.source(name)


def test_what_comes_and_goes_is_seen(tmp_path: Path) -> None:
    listing = Listing(tmp_path)
    assert listing.names() == []
    (tmp_path / "dog.safetensors").touch()
    assert "dog" in listing
    (tmp_path / "dog.safetensors").unlink()
    assert "dog" not in listing


def test_two_of_a_name_are_refused_by_it(tmp_path: Path) -> None:
    (tmp_path / "dog.safetensors").touch()
    (tmp_path / "dog").mkdir()
    (tmp_path / "cat").mkdir()
    listing = Listing(tmp_path)
    assert listing.source("cat") == tmp_path / "cat"
    with pytest.raises(AdapterNameError, match=r"Two adapters are named 'dog': dog and dog\.safetensors"):
        listing.source("dog")


def test_ten_thousand_names_cost_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10_000):
        (tmp_path / f"subject-{number}.safetensors").touch()
    listing = Listing(tmp_path)
    monkeypatch.setattr("diffusekrona.serving.listing.os.scandir", lambda *_: pytest.fail("looked again"))
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened"))
    started = time.process_time()
    for number in range(1000):
        assert listing.source(f"subject-{number}").name == f"subject-{number}.safetensors"
    assert time.process_time() - started < 1


def test_ids_of_the_hub_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetched(name: str, **_: object) -> str:
        asked.append(name)
        if name == "them/none":
            raise OSError("no such repository")
        return str(tmp_path)

    monkeypatch.setattr("diffusekrona.storage.snapshot_download", fetched)
    listing = Listing(["them/dog", "them/none"])
    assert listing.names() == ["them/dog", "them/none"]
    assert asked == []
    assert listing.source("them/dog") == listing.source("them/dog") == tmp_path
    assert asked == ["them/dog"]
    with pytest.raises(AdapterFileError, match="could not be fetched"):
        listing.source("them/none")
    with pytest.raises(AdapterNameError, match="them/other"):
        listing.source("them/other")


def test_no_folder_and_no_ids_are_errors(tmp_path: Path) -> None:
    with pytest.raises(KronAError, match="cannot be read"):
        Listing(tmp_path / "missing")
    with pytest.raises(KronAError, match="There are no adapters"):
        Listing([])
