"""`merge_krona(exact=…)`: every bit back, out of entries or a copy, or the weights to rounding."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_krona, save_krona, unload_krona, unmerge_krona
from diffusekrona.errors import ConfigError, MergeError
from diffusekrona.tuner import memory, model
from diffusekrona.tuner.injected import krona_layers
from tests.modules import network
from tests.pipelines import tiny_sd_pipeline
from tests.snapshots import bits, unchanged

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
EVERY = pytest.mark.parametrize("exact", [True, "copy", False])
EXACTLY = pytest.mark.parametrize("exact", [True, "copy"])


def config(**fields: Any) -> KronAConfig:
    return KronAConfig(**{"a1": 2, "a2": 8, "init_weights": False, "alpha": 0.1, **fields})


def says_that_it_rounds() -> Any:
    return pytest.warns(UserWarning, match=r"merged with exact=False is subtracted .* not bit for bit")


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    made = network().to(dtype)
    inject_krona(made, config())
    return made


def weights(made: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in krona_layers(made).items()}


@DTYPES
@EVERY
def test_the_merged_weights_are_the_float64_sums_whatever_comes_back(dtype: torch.dtype, exact: Any) -> None:
    made, eps = adapted(dtype), torch.finfo(dtype).eps
    before = weights(made)
    merge_krona(made, exact=exact)
    for name, layer in krona_layers(made).items():
        update = 0.1 * torch.kron(layer.krona_A["default"].double(), layer.krona_B["default"].double())
        merged = layer.get_base_layer().weight.double()
        torch.testing.assert_close(merged, before[name].double() + update, rtol=eps, atol=1e-6)
        assert not torch.equal(merged, before[name].double())


@DTYPES
@EXACTLY
def test_every_bit_comes_back_and_no_warning_with_it(dtype: torch.dtype, exact: Any) -> None:
    made = adapted(dtype)
    before = bits(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            merge_krona(made, exact=exact)
            assert bits(made) != before
            unmerge_krona(made)
            assert bits(made) == before


@DTYPES
def test_an_inexact_merge_keeps_nothing_and_comes_back_to_rounding_with_a_warning(dtype: torch.dtype) -> None:
    made, eps = adapted(dtype), torch.finfo(dtype).eps
    before = weights(made)
    merge_krona(made, exact=False)
    assert {layer.restoration.nbytes for layer in krona_layers(made).values()} == {0}
    with says_that_it_rounds():
        unmerge_krona(made)
    after = weights(made)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=eps, atol=2 * eps * float(weight.abs().max()))
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())


def test_a_copy_is_as_large_as_the_weights_and_entries_are_smaller() -> None:
    sizes = {}
    for exact in (True, "copy"):
        made = adapted()
        merge_krona(made, exact=exact)
        sizes[exact] = sum(layer.restoration.nbytes for layer in krona_layers(made).values())
    assert 0 < sizes[True] < sizes["copy"] == sum(weight.nbytes for weight in weights(made).values())


def test_entries_are_kept_where_there_is_no_room_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    made = adapted(torch.bfloat16)
    before, size = bits(made), sum(weight.nbytes for weight in weights(made).values())
    for room, kept in ((2 * size, "copy"), (2 * size - 1, "entries")):
        monkeypatch.setattr(memory, "available_memory", lambda device, room=room: room)
        merge_krona(made, exact="copy")
        assert {layer.kept for layer in krona_layers(made).values()} == {kept}
        unmerge_krona(made)
        assert bits(made) == before


def test_a_cpu_has_memory_and_what_is_no_device_has_none() -> None:
    assert memory.available_memory(torch.device("cpu")) > 1 << 20
    assert memory.available_memory(torch.device("meta")) == 0


@pytest.mark.parametrize("exact", [None, "entries", "true", 2])
def test_another_word_is_refused_with_those_that_are_known(exact: Any) -> None:
    made = adapted()
    with unchanged(made), pytest.raises(ConfigError, match='exact must be True, "copy" or False; it is'):
        merge_krona(made, exact=exact)


@EVERY
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_in_the_last_layer_changes_nothing_anywhere(exact: Any, value: float) -> None:
    made = adapted(torch.float16)
    name, layer = list(krona_layers(made).items())[-1]
    layer.krona_B["default"].data[-1, -1] = value
    with unchanged(made), pytest.raises(MergeError, match=rf"{name}: .*Nothing was merged"):
        merge_krona(made, exact=exact)


@pytest.mark.parametrize(("first", "second"), [(True, False), ("copy", False), (False, True), (False, "copy")])
def test_what_mixes_exact_and_inexact_in_the_last_layer_only_changes_nothing_anywhere(first: Any, second: Any) -> None:
    made = adapted()
    inject_krona(made, config(target_modules=["to_q"]), "other")
    layers = krona_layers(made)
    name = [name for name in layers if name.endswith("to_q")][-1]
    merge_krona(made, "other", exact=first)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exact=False")
        for one, layer in layers.items():
            if one != name:
                layer.unmerge()
    with unchanged(made), pytest.raises(MergeError, match=rf"{name}: other is merged into it .*Nothing was merged"):
        merge_krona(made, "default", exact=second)


@EVERY
def test_merging_again_is_no_change(exact: Any) -> None:
    made = adapted()
    merge_krona(made, exact=exact)
    with unchanged(made):
        merge_krona(made, exact=exact)


@EVERY
def test_a_merged_adapter_is_saved_as_it_is_unmerged(exact: Any, tmp_path: Path) -> None:
    made = adapted()
    save_krona(made, tmp_path / "before.safetensors")
    merge_krona(made, exact=exact)
    save_krona(made, tmp_path / "merged.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "merged.safetensors").read_bytes()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exact=False")
        load_krona(made, tmp_path / "merged.safetensors", "again")  # for which PEFT unmerges
        assert not any(layer.merged_adapters for layer in krona_layers(made).values())
        merge_krona(made, "again", exact=exact)


@EXACTLY
def test_unloading_what_is_merged_leaves_the_pipeline_as_it_was(exact: Any) -> None:
    pipe = tiny_sd_pipeline()
    before = bits(pipe.unet)
    inject_krona(pipe, config())
    merge_krona(pipe, exact=exact)
    unload_krona(pipe)
    assert bits(pipe.unet) == before


def test_unloading_what_is_merged_inexactly_says_so() -> None:
    made = network()
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    inject_krona(made, config())
    merge_krona(made, exact=False)
    with says_that_it_rounds():
        unload_krona(made)
    after = made.state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-6, atol=1e-6)


@EXACTLY
def test_what_was_merged_is_merged_again_in_its_way_where_an_injection_fails(
    exact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapted(torch.bfloat16)
    merge_krona(made, exact=exact)
    merged, kept = bits(made), {layer.kept for layer in krona_layers(made).values()}

    def fail(_: nn.Module) -> None:
        raise RuntimeError("too late")

    monkeypatch.setattr(model, "bring_to_fused", fail)
    with pytest.raises(RuntimeError, match="too late"):
        inject_krona(made, config(), "second")
    assert bits(made) == merged
    assert {layer.kept for layer in krona_layers(made).values()} == kept
