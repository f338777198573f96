"""Local paths, and repositories of the Hugging Face hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from torch import nn

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_file, save_krona
from diffusekrona.errors import AdapterFileError
from diffusekrona.formats import hub
from tests.modules import network
from tests.snapshots import unchanged


def saved(path: Path) -> nn.Module:
    model = network()
    inject_krona(model, KronAConfig(a1=2, a2=8))
    save_krona(model, path)
    return model


def test_a_local_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("owner/name") == Path("owner/name")
    assert hub.resolve(tmp_path / "owner") == tmp_path / "owner"
    assert hub.resolve("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    "name",
    ["no-such-folder", "no/such/folder", "./no-such", "owner/name.safetensors", "owner/na me", "owner/", ""],
)
def test_what_cannot_be_a_hub_id_is_not_looked_up_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def asked(*arguments: Any, **options: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", asked)
    # An empty name is the folder we are in, and there is nothing in it.
    with pytest.raises(AdapterFileError, match="does not exist" if name else "It holds: nothing"):
        load_krona(network(), name)


def test_a_hub_repository_is_fetched_without_anything_but_safetensors_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fetched(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetched)
    model, loaded = saved(tmp_path), network()
    adapter = load_krona(loaded, "someone/my-dog", revision="v2", token="abc")
    options = {"revision": "v2", "token": "abc", "allow_patterns": ["*.safetensors", "*.json"]}
    merge_file(network(), "someone/my-dog", revision="v2", token="abc")
    assert calls == [("someone/my-dog", options)] * 2
    factors = [name for name, _ in model.named_parameters() if "krona" in name]
    assert len(list(adapter.parameters())) == len(factors)


def test_what_the_hub_has_in_its_cache_loads_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--my-dog", "0123456789abcdef0123456789abcdef01234567"
    saved(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    load_krona(network(), "someone/my-dog")


def test_a_repository_that_cannot_be_fetched_is_an_error_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = network()
    with (
        unchanged(model),
        pytest.raises(
            AdapterFileError,
            match=r"someone/my-dog does not exist here, and could not be fetched .*LocalEntryNotFoundError",
        ),
    ):
        load_krona(model, "someone/my-dog")
