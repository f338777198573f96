"""Adapters in models whose weights are elsewhere until they are needed, and in models that are wrapped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusekrona import (
    KronAConfig,
    inject_krona,
    load_krona,
    merge_file,
    merge_krona,
    save_krona,
    unload_krona,
    unmerge_krona,
)
from diffusekrona.errors import MergeError
from diffusekrona.tuner.injected import krona_layers
from tests.pipelines import tiny_sd_pipeline
from tests.snapshots import assert_same, snapshot

FORMS = pytest.mark.parametrize("form", [{}, {"num_terms": 2}, {"b_rank": 1}, {"layout": "transposed"}], ids=str)


def config(**fields: Any) -> KronAConfig:
    return KronAConfig(**{"a1": 4, "a2": 8, "init_b": "normal", **fields})


def output(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return unet(torch.randn(2, 4, 8, 8, generator=generator), 7, torch.randn(2, 5, 64, generator=generator)).sample


def on_cpu(unet: nn.Module, folder: Path) -> None:
    """Weights wait in a dictionary and are meta tensors in the model: accelerate's sequential offloading."""
    accelerate.cpu_offload(unet, execution_device="cpu")


def on_disk(unet: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(unet, str(folder / "offloaded"), execution_device="cpu")


def in_groups_on_disk(unet: nn.Module, folder: Path) -> None:
    """Weights of leaves wait in files and are empty tensors in the model: Diffusers' group offloading."""
    apply_group_offloading(
        unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level",
        offload_to_disk_path=str(folder / "groups"),
    )  # fmt: skip


WAYS = [on_cpu, on_disk, in_groups_on_disk]


@FORMS
@pytest.mark.parametrize("offload", WAYS)
def test_an_adapter_computes_the_same_where_weights_are_offloaded_after_it_was_added(
    tmp_path: Path, offload: Callable[[nn.Module, Path], None], form: dict[str, Any]
) -> None:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config(**form))
    expected = output(pipe.unet)
    offload(pipe.unet, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-5, atol=1e-5)


@FORMS
@pytest.mark.parametrize("offload", WAYS)
def test_an_adapter_loads_into_a_model_that_is_offloaded_already(
    tmp_path: Path, offload: Callable[[nn.Module, Path], None], form: dict[str, Any]
) -> None:
    pipe, other = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(pipe, config(**form))
    saved, expected = save_krona(pipe, tmp_path / "adapter.safetensors"), output(pipe.unet)
    base = output(other.unet)
    offload(other.unet, tmp_path)
    load_krona(other, saved)
    for _ in range(2):
        torch.testing.assert_close(output(other.unet), expected, rtol=1e-5, atol=1e-5)
    again = save_krona(other, tmp_path / "again.safetensors")
    assert again.read_bytes() == saved.read_bytes()
    unload_krona(other)
    torch.testing.assert_close(output(other.unet), base, rtol=1e-5, atol=1e-5)


def in_groups(unet: nn.Module, folder: Path) -> None:
    apply_group_offloading(
        unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


@pytest.mark.parametrize("offload", [on_cpu, on_disk, in_groups])
@pytest.mark.parametrize("first", ["adapter", "offloading"])
def test_offloaded_weights_are_merged_and_unmerged(
    tmp_path: Path, offload: Callable[[nn.Module, Path], None], first: str
) -> None:
    pipe = tiny_sd_pipeline()
    base = output(pipe.unet)
    if first == "offloading":
        offload(pipe.unet, tmp_path)
    inject_krona(pipe, config())
    if first == "adapter":
        offload(pipe.unet, tmp_path)
    expected = output(pipe.unet)
    assert (expected - base).abs().max() > 1e-3
    merge_krona(pipe)
    assert all(layer.merged for layer in krona_layers(pipe.unet).values())
    torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-4, atol=1e-5)
    unmerge_krona(pipe)
    torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-5, atol=1e-5)
    unload_krona(pipe)
    assert torch.equal(output(pipe.unet), base)


def test_weights_that_wait_in_files_of_groups_are_not_merged_into_and_the_error_says_why(tmp_path: Path) -> None:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config())
    saved, expected = save_krona(pipe, tmp_path / "adapter.safetensors"), output(pipe.unet)
    in_groups_on_disk(pipe.unet, tmp_path)
    for merge in (merge_krona, lambda pipe: merge_file(pipe, saved)):
        with pytest.raises(MergeError, match=r"are offloaded to .*groups.*merge first"):
            merge(pipe)
    torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-5, atol=1e-5)


def images(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    result = pipe("ab", height=32, width=32, num_inference_steps=2, output_type="np", generator=generator)
    return np.asarray(result.images)


@pytest.mark.parametrize("first", ["adapter", "offloading"])
def test_a_pipeline_that_offloads_whole_models_takes_and_merges_adapters(tmp_path: Path, first: str) -> None:
    pipe, plain = tiny_sd_pipeline(), tiny_sd_pipeline()
    base = images(plain)
    inject_krona(plain, config(), text_encoders=True)
    saved, expected = save_krona(plain, tmp_path / "adapter.safetensors"), images(plain)
    assert np.abs(expected - base).max() > 1e-3
    if first == "adapter":
        load_krona(pipe, saved)
    pipe.enable_model_cpu_offload(device="cuda" if torch.cuda.is_available() else "cpu")
    if first == "offloading":
        load_krona(pipe, saved)
    for _ in range(2):
        np.testing.assert_allclose(images(pipe), expected, atol=1e-4)
    merge_krona(pipe)
    np.testing.assert_allclose(images(pipe), expected, atol=1e-4)
    unload_krona(pipe)
    np.testing.assert_allclose(images(pipe), base, atol=1e-4)


# Wrapped models


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_the_helpers_look_through_distributed_training_and_gradients_are_those_without_it(tmp_path: Path) -> None:
    pipe, other = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(pipe.unet, config())
    saved = save_krona(pipe.unet, tmp_path / "adapter.safetensors")
    load_krona(other.unet, saved, trainable=True)
    wrapped = DistributedDataParallel(other.unet)
    inputs = torch.randn(2, 4, 8, 8), 7, torch.randn(2, 5, 64)
    for unet in (pipe.unet, wrapped):
        unet(*inputs).sample.square().mean().backward()
    for name, layer in krona_layers(other.unet).items():
        ours = krona_layers(pipe.unet)[name].krona_B["default"].grad
        torch.testing.assert_close(layer.krona_B["default"].grad, ours, rtol=1e-4, atol=1e-6)
    again = save_krona(wrapped, tmp_path / "again.safetensors")
    assert again.read_bytes() == saved.read_bytes()
    before = snapshot(other.unet)
    merge_krona(wrapped)
    assert all(layer.merged for layer in krona_layers(other.unet).values())
    unmerge_krona(wrapped)
    assert_same(before, snapshot(other.unet))


def test_a_compiled_unet_takes_an_adapter_and_computes_the_same(tmp_path: Path) -> None:
    pipe, other = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(pipe, config())
    saved = save_krona(pipe, tmp_path / "adapter.safetensors")
    other.unet = torch.compile(other.unet, backend="eager")
    load_krona(other, saved)
    torch.testing.assert_close(output(other.unet), output(pipe.unet), rtol=1e-5, atol=1e-5)
    assert save_krona(other, tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()
    merge_krona(other)
    torch.testing.assert_close(output(other.unet), output(pipe.unet), rtol=1e-4, atol=1e-5)
    unmerge_krona(other)
