"""Reading safetensors files, damaged ones and others too, and writing files whole or not at all."""

import os
import pickle
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_file, save_krona
from diffusekrona import storage as hub
from diffusekrona.errors import AdapterFileError
from diffusekrona.storage import read_safetensors, write_whole
from tests.modules import network
from tests.snapshots import unchanged

TENSORS = {"a.krona_A": torch.arange(6.0).view(2, 3), "a.krona_B": torch.ones(4, 1, dtype=torch.bfloat16)}
OLD, NEW = b"old " * 5000, b"new " * 9000

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
as_user = pytest.mark.skipif(ROOT, reason="root may read and write what others may not")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Reading


def test_tensors_and_header_entries_are_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"one": "1", "two": "2"})
    tensors, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
    assert tensors["a.krona_B"].dtype == torch.bfloat16
    assert metadata == {"one": "1", "two": "2"}


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    # A header of 128 bytes starts the file with the byte that starts a pickle.
    path, first_bytes = tmp_path / "x.safetensors", set()
    for length in range(0, 300, 4):
        save_file(TENSORS, path, metadata={"k": "x" * length})
        first_bytes.add(path.read_bytes()[0])
        assert read_safetensors(path)[1] == {"k": "x" * length}
    assert 0x80 in first_bytes


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl", "x.safetensors"])
@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, name: str, new: bool) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return os.mkdir, (str(tmp_path / "run"),)

    path = tmp_path / name
    torch.save({"a": Trap()}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(AdapterFileError, match=f"{name} is a pickle, which can run code"):
        read_safetensors(path)
    path.write_bytes(pickle.dumps(Trap(), protocol=4))
    with pytest.raises(AdapterFileError, match=f"{name} is a pickle, which can run code"):
        read_safetensors(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"{}",
        bytes(8),
        bytes(100),
        b"\xff" * 64,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}" + b"more",
        (8).to_bytes(8, "little") + b'{"a": 1}',
        b"<!doctype html><html>Not Found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    ],
)
def test_what_is_no_safetensors_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"x\.safetensors is not a complete safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "folder", "folder/missing.safetensors"])
def test_what_is_no_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(AdapterFileError, match=f"{name} is not a file"):
        read_safetensors(tmp_path / name)


@as_user
def test_a_file_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    path.chmod(0)
    with pytest.raises(AdapterFileError, match="cannot be read"):
        read_safetensors(path)


TMP = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@TMP
@given(length=st.integers(0, len(save(TENSORS, {"k": "v"})) - 1))
def test_any_prefix_is_an_error(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(TENSORS, {"k": "v"})[:length])
    with pytest.raises(AdapterFileError):
        read_safetensors(path)


@TMP
@given(data=st.data())
def test_any_flipped_bytes_are_an_error_or_give_tensors(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(save(TENSORS, {"k": "v"}))
    for index in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        whole[index] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    try:
        tensors, metadata = read_safetensors(path)
    except AdapterFileError:
        return
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    assert all(isinstance(value, str) for value in metadata.values())


# Writing


def test_files_are_written_into_folders_that_are_made(tmp_path: Path) -> None:
    write_whole({tmp_path / "a" / "b" / "x.bin": OLD, tmp_path / "y.bin": NEW})
    assert contents(tmp_path) == {"a/b/x.bin": OLD, "y.bin": NEW}


def test_files_are_replaced(tmp_path: Path) -> None:
    write_whole({tmp_path / "x": OLD})
    write_whole({tmp_path / "x": NEW})
    assert contents(tmp_path) == {"x": NEW}


def test_a_reader_of_the_old_file_goes_on_reading_it(tmp_path: Path) -> None:
    write_whole({tmp_path / "x": OLD})
    with (tmp_path / "x").open("rb") as reader:
        start = reader.read(4)
        write_whole({tmp_path / "x": NEW})
        assert start + reader.read() == OLD


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_users_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_whole({tmp_path / "x": NEW})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_a_folder_of_that_name_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "y").mkdir()
    write_whole({tmp_path / "x": OLD})
    with pytest.raises(IsADirectoryError, match="y is a folder"):
        write_whole({tmp_path / "x": NEW, tmp_path / "y": NEW})
    assert contents(tmp_path) == {"x": OLD}


def test_a_file_where_a_folder_is_meant_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    write_whole({tmp_path / "x": OLD})
    with pytest.raises(OSError, match="x"):
        write_whole({tmp_path / "z": NEW, tmp_path / "x" / "y": NEW})
    assert contents(tmp_path) == {"x": OLD}


@as_user
def test_a_read_only_folder_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    write_whole({tmp_path / "x": OLD})
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            write_whole({tmp_path / "x": NEW})
        assert contents(tmp_path) == {"x": OLD}
    finally:
        tmp_path.chmod(0o700)


def forked(action: Callable[[], None]) -> int:
    """Run an action in a child process; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@fork
@pytest.mark.skipif(not ROOT, reason="the test above does without another user")
def test_a_read_only_folder_is_an_error_for_another_user() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_whole({folder / "x": OLD})
        folder.chmod(0o555)

        def save_as_nobody() -> None:
            os.seteuid(65534)
            with pytest.raises(PermissionError):
                write_whole({folder / "x": NEW})

        assert forked(save_as_nobody) == 0
        assert contents(folder) == {"x": OLD}


@fork
def test_a_file_that_grows_too_large_leaves_the_old_files_and_no_others(tmp_path: Path) -> None:
    write_whole({tmp_path / "x": OLD, tmp_path / "y": OLD})

    def save_little() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) - 1, len(NEW) - 1))
        with pytest.raises(OSError, match="File too large"):
            write_whole({tmp_path / "x": b"small", tmp_path / "y": NEW})

    assert forked(save_little) == 0
    assert contents(tmp_path) == {"x": OLD, "y": OLD}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if done.returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_old_files_and_no_others(small_disk: Path) -> None:
    write_whole({small_disk / "x": OLD, small_disk / "y": OLD})
    with pytest.raises(OSError, match="No space left"):
        write_whole({small_disk / "x": b"small", small_disk / "y": NEW})
    assert contents(small_disk) == {"x": OLD, "y": OLD}
    write_whole({small_disk / "x": b"small"})


class Killing:
    """Kills the process at the n-th call of a function of `os`, before or after the call."""

    def __init__(self, name: str, call: int, after: bool) -> None:
        self.function, self.left, self.after = getattr(os, name), call, after
        setattr(os, name, self)

    def __call__(self, *arguments: object) -> object:
        self.left -= 1
        if self.left == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.function(*arguments)
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


@fork
@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_step_leaves_each_file_old_or_new(tmp_path: Path, name: str, call: int, after: bool) -> None:
    write_whole({tmp_path / "x": OLD, tmp_path / "y": OLD})

    def save_and_die() -> None:
        Killing(name, call, after)
        write_whole({tmp_path / "x": NEW, tmp_path / "y": NEW})

    assert forked(save_and_die) == -signal.SIGKILL
    renamed = (call if after else call - 1) if name == "replace" else 0
    found = contents(tmp_path)
    assert [found["x"], found["y"]] == [NEW] * renamed + [OLD] * (2 - renamed)
    assert all(left.endswith(".tmp") for left in found.keys() - {"x", "y"})
    write_whole({tmp_path / "x": NEW, tmp_path / "y": NEW})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes() == NEW


@fork
def test_a_kill_at_any_time_leaves_each_file_old_or_new(tmp_path: Path) -> None:
    new = NEW * 50
    write_whole({tmp_path / "x": OLD})

    def save_again_and_again() -> None:
        while True:
            write_whole({tmp_path / "x": new})
            write_whole({tmp_path / "x": OLD})

    for milliseconds in (1, 2, 3, 5, 8, 13):
        child = os.fork()
        if child == 0:
            save_again_and_again()
        time.sleep(milliseconds / 1000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert (tmp_path / "x").read_bytes() in (OLD, new)


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
