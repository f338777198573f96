import errno
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusekrona import inject_krona, unload_krona
from diffusekrona import storage as files
from diffusekrona.bases.loading import load_base
from diffusekrona.training import CheckpointError, Checkpoints, read_checkpoint
from diffusekrona.training.checkpoints import base_identity
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline
from tests.training.runs import FAMILIES


@FAMILIES
def test_a_base_is_the_same_wherever_it_is_loaded_from(build, tmp_path):
    build().save_pretrained(tmp_path / "base")
    loaded = load_base(tmp_path / "base")
    assert base_identity(loaded) == base_identity(build())
    assert base_identity(load_base(tmp_path / "base", torch.bfloat16)) != base_identity(loaded)


def test_other_weights_other_models_and_another_scheduler_are_another_base():
    pipes = [
        tiny_sd_pipeline(), tiny_sd_pipeline(seed=1), tiny_sd3_pipeline(),
        tiny_sd_pipeline(prediction_type="v_prediction"),
    ]  # fmt: skip
    assert len({base_identity(pipe) for pipe in pipes}) == 4


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_each_weight_counts(part):
    pipe = tiny_sd_pipeline()
    before = base_identity(pipe)
    weights = list(getattr(pipe, part).parameters())
    for weight in (weights[0], weights[-1]):
        kept = weight.data.clone()
        weight.data += 1
        assert base_identity(pipe) != before
        weight.data = kept
    assert base_identity(pipe) == before


def test_an_adapter_that_came_and_went_leaves_no_trace():
    pipe = tiny_sd_pipeline()
    before = base_identity(pipe)
    inject_krona(pipe)
    unload_krona(pipe)
    assert base_identity(pipe) == before


class Packed(Tensor):
    """As quantized weights are: a type of tensor that not every operation knows."""

    def flatten(self, *_):
        raise NotImplementedError


def identity(weights, part="unet"):
    """Of a pipeline with one model."""
    model = nn.Module()
    for name, weight in weights.items():
        model.register_buffer(name, weight)
    return base_identity(SimpleNamespace(scheduler=SimpleNamespace(config={}), components={part: model, "other": None}))


def test_names_shapes_types_and_numbers_from_all_over_a_weight_count():
    zeros = torch.zeros(16, 8)
    late = zeros.clone()
    late[8:] = 1
    found = [
        identity({"a": zeros}), identity({"b": zeros}), identity({"a": zeros}, "vae"), identity({"a": zeros.T}),
        identity({"a": zeros.int()}), identity({"a": late}),
    ]  # fmt: skip
    assert len(set(found)) == len(found)


def test_another_pipeline_of_the_same_models_is_another_base():
    pipe = tiny_sd_pipeline()
    other = type("OtherPipeline", (), {"scheduler": pipe.scheduler, "components": pipe.components})()
    assert base_identity(other) != base_identity(pipe)


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 2).as_subclass(Packed), torch.zeros(4, 2, device="meta"), torch.zeros(0, 2)]
)
def test_of_weights_without_numbers_the_shapes_count(weight):
    assert identity({"a": weight}) == identity({"a": weight})
    assert identity({"a": weight}) != identity({"a": weight.reshape(-1)})


VALUES = {"step": 3, "config": {"learning_rate": 1e-4, "snr_gamma": None}, "images": ["a"]}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "factor/A": torch.randn(2, 3, generator=generator),
        "optimizer/step": torch.tensor(3.0),
        "optimizer/state": torch.arange(5, dtype=torch.uint8),
        "losses": torch.tensor([0.5, float("nan")], dtype=torch.float64),
    }


def save(folder, step, limit=2):
    return Checkpoints(folder, limit).save(step, tensors(step), {**VALUES, "step": step})


def steps_in(folder):
    return [int(path.stem.removeprefix("step-")) for path in sorted(folder.iterdir())]


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_what_was_saved_is_read_back(tmp_path):
    path = save(tmp_path / "new" / "folder", 3)
    found = read_checkpoint(path)
    assert (found.step, found.values, found.path) == (3, VALUES, path)
    same_bits(found.tensors, tensors(3))


def test_the_newest_is_found_by_its_step(tmp_path):
    for step in (9, 10, 11):
        save(tmp_path, step)
    assert Checkpoints(tmp_path, 2).newest().step == 11


def test_a_folder_without_any_has_no_newest(tmp_path):
    assert Checkpoints(tmp_path, 2).newest() is None
    assert Checkpoints(tmp_path / "nowhere", 2).newest() is None


@given(st.lists(st.integers(1, 30), min_size=1, max_size=10, unique=True), st.integers(1, 4))
def test_the_newest_are_kept_up_to_the_limit(tmp_path_factory, steps, limit):
    folder = tmp_path_factory.mktemp("kept")
    for step in sorted(steps):
        save(folder, step, limit)
    assert steps_in(folder) == sorted(steps)[-limit:]


@pytest.mark.parametrize("limit", [1, 2])
def test_what_is_saved_stays_and_later_ones_of_another_run_go(tmp_path, limit):
    for step in (400, 500):
        save(tmp_path, step, 2)
    save(tmp_path, 100, limit)
    assert steps_in(tmp_path) == [100]
    save(tmp_path, 200, limit)
    assert steps_in(tmp_path) == [100, 200][-limit:]


@given(st.data())
def test_a_file_with_any_byte_changed_is_refused_or_the_same(tmp_path, data):
    path = save(tmp_path, 3)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = read_checkpoint(path)
    except CheckpointError:
        return
    # What fills up the header may be any blank.
    assert found.values == VALUES
    same_bits(found.tensors, tensors(3))


@given(st.data())
def test_a_file_that_was_cut_off_is_refused(tmp_path, data):
    path = save(tmp_path, 3)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError, match="no checkpoint of a run, or a damaged one"):
        read_checkpoint(path)


def test_a_changed_number_is_noticed(tmp_path):
    path = save(tmp_path, 3)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its checksum is another"):
        read_checkpoint(path)


def test_damaged_ones_are_passed_over_with_a_warning(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step, 3)
    sorted(tmp_path.iterdir())[2].write_bytes(b"")
    sorted(tmp_path.iterdir())[1].write_bytes(b"\0" * 100)
    assert Checkpoints(tmp_path, 3).newest().step == 1
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert "step-00000003" in warned[0]
    assert "The one before it is tried." in warned[0]


def test_an_adapters_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(files.safetensors_bytes(tensors(), {}))
    with pytest.raises(CheckpointError, match="no checkpoint of a run"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        read_checkpoint(tmp_path / "nothing.safetensors")


def fill_disk(monkeypatch, call):
    """No room is left, which is noticed when the content is written out or when the file is named."""

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, call, fail)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(tmp_path, monkeypatch, call):
    before = save(tmp_path, 1, 1)
    content = before.read_bytes()
    fill_disk(monkeypatch, call)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space.* is whole: .*step-00000001"):
        save(tmp_path, 2, 1)
    assert [path.name for path in tmp_path.iterdir()] == [before.name]
    assert before.read_bytes() == content


def test_a_disk_that_is_full_at_once_says_that_nothing_was_saved(tmp_path, monkeypatch):
    fill_disk(monkeypatch, "fsync")
    with pytest.raises(CheckpointError, match="There is none before it"):
        save(tmp_path, 2)
    assert not list(tmp_path.iterdir())
