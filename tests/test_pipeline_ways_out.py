"""What the errors of the pipeline's helpers tell users to do instead is done here, and works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusekrona import (
    KronAConfig,
    hotswap_krona,
    inject_krona,
    load_krona,
    merge_krona,
    save_krona,
    unload_krona,
    unmerge_krona,
)
from diffusekrona.tuner.injected import krona_layers
from tests.modules import network
from tests.pipelines import tiny_sd_pipeline
from tests.refusals import refusal

FIT: dict[str, Any] = {"a1": 2, "a2": 4, "init_weights": False}


def saved(folder: Path, **fields: Any) -> Path:
    model = network()
    inject_krona(model, KronAConfig(**{**FIT, **fields}))
    return save_krona(model, folder / "dog.safetensors")


def adapted(**fields: Any) -> nn.Module:
    model = network()
    inject_krona(model, KronAConfig(**{**FIT, **fields}))
    return model


@pytest.mark.parametrize("way", ["inject_krona", "load_krona"])
def test_what_is_to_be_merged_is_added(way, tmp_path):
    model = network()
    assert way in refusal(merge_krona, model).partition("add one with ")[2]
    if way == "inject_krona":
        inject_krona(model, KronAConfig(**FIT))
    else:
        load_krona(model, saved(tmp_path))
    merge_krona(model)
    assert all(layer.merged for layer in krona_layers(model).values())


@pytest.mark.parametrize("targets", [["to_q"], r".*\.to_q", "attention"], ids=str)
def test_a_target_that_fits_nothing_is_a_name_a_regular_expression_or_a_word(targets):
    text = refusal(inject_krona, network(), KronAConfig(**FIT, target_modules=["query"]))
    assert "names, a regular expression that matches whole names, or a word such as 'attention'" in text
    assert "layers_pattern" not in text
    inject_krona(network(), KronAConfig(**FIT, target_modules=targets))


def test_indices_that_fit_nothing_count_in_the_list_that_is_named():
    text = refusal(inject_krona, network(), KronAConfig(**FIT, layers_to_transform=[1]))
    assert "Give layers_pattern, too" in text
    model = adapted(layers_to_transform=[1], layers_pattern="blocks")
    assert {name.rpartition(".to_")[0] for name in krona_layers(model)} == {"blocks.1"}
    text = refusal(inject_krona, network(), KronAConfig(**FIT, layers_to_transform=[7], layers_pattern="blocks"))
    assert "Give layers_pattern" not in text


@pytest.mark.parametrize("change", [{"a1": 4}, {"target_modules": ["to_q"]}, {"num_terms": 2}], ids=str)
def test_an_unequal_adapter_is_loaded_beside_the_other_under_another_name(change, tmp_path):
    model, path = adapted(), saved(tmp_path, **change)
    text = refusal(hotswap_krona, model, path)
    assert "another adapter_name and load it beside that one with load_krona" in text
    load_krona(model, path, adapter_name="other")
    assert set(model.peft_config) == {"default", "other"}


def test_a_merged_adapter_is_swapped_once_it_is_unmerged(tmp_path):
    model, path = adapted(), saved(tmp_path)
    merge_krona(model)
    assert "unmerge it before it is swapped" in refusal(hotswap_krona, model, path)
    unmerge_krona(model)
    hotswap_krona(model, path)


def test_an_adapter_for_other_parts_is_loaded_after_the_other_is_gone(tmp_path):
    pipe, other = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(other, text_encoders=True)
    path = save_krona(other, tmp_path / "dog.safetensors")
    inject_krona(pipe)
    text = refusal(hotswap_krona, pipe, path)
    assert "only equal adapters can be swapped; load it with load_krona after unload_krona" in text
    unload_krona(pipe, "default")
    load_krona(pipe, path)


def test_a_merge_that_failed_changed_nothing_and_a_smaller_weight_merges():
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for layer in krona_layers(model).values():
            layer.set_scale("default", 1e39)
    assert "Nothing was merged" in refusal(merge_krona, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for layer in krona_layers(model).values():
        layer.set_scale("default", 1)
    merge_krona(model)
