"""What the tuner's errors tell users to do instead is done here, and works."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, get_peft_model
from torch import nn

from diffusekrona import (
    KronAConfig,
    inject_krona,
    krona_batch,
    load_krona,
    merge_krona,
    save_krona,
    unload_krona,
    unmerge_krona,
)
from diffusekrona.errors import BatchError
from diffusekrona.tuner.injected import krona_layers
from diffusekrona.tuner.model import KronAModel
from tests.modules import inputs, network
from tests.pipelines import tiny_sd_pipeline
from tests.refusals import choices, refusal

FIT: dict[str, Any] = {"a1": 2, "a2": 4}
"""Factors of every layer of the small network."""


def layers_of(**fields: Any) -> list[str]:
    model = network()
    inject_krona(model, KronAConfig(**{**FIT, **fields}))
    return sorted(krona_layers(model))


ALL = layers_of()
FIRST_Q = {"target_modules": ["blocks.0.to_q"]}


# The config


@pytest.mark.parametrize(
    ("wrong", "said", "right", "same_as"),
    [
        ({"target_modules": []}, "name at least one layer", {"target_modules": ["blocks.0.to_q"]}, FIRST_Q),
        ({"target_modules": []}, "or leave it out for Q, K, V and O", {},
         {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}),
        ({"layers_pattern": "blocks", "target_modules": ["to_q"]}, "give the indices",
         {"layers_pattern": "blocks", "target_modules": ["to_q"], "layers_to_transform": [0]}, FIRST_Q),
        ({"layers_to_transform": [0], "target_modules": r".*\.to_q"}, "put the indices into the expression",
         {"target_modules": r"blocks\.0\.to_q"}, FIRST_Q),
        ({"layers_to_transform": [0], "target_modules": r".*\.to_q"}, "or give target_modules as a list of names",
         {"layers_to_transform": [0], "layers_pattern": "blocks", "target_modules": ["to_q"]}, FIRST_Q),
        ({"layers_to_transform": "0"}, "one or more layer indices of at least 0",
         {"layers_to_transform": [0], "layers_pattern": "blocks"}, {"target_modules": r"blocks\.0\.to_(q|k|v|out\.0)"}),
        ({"exclude_modules": 1}, "must be a list of names", {"exclude_modules": ["to_k"]},
         {"target_modules": ["to_q", "to_v", "to_out.0"]}),
        ({"a1": 0}, "two whole numbers of at least 1", {"a1": 1}, {}),
        ({"num_terms": 0}, "a whole number of at least 1", {"num_terms": 1}, {}),
        ({"terms_pattern": {"to_q": 0}}, "a whole number of at least 1", {"terms_pattern": {"to_q": 1}}, {}),
        ({"terms_pattern": ["to_q"]}, "must map regular expressions to values", {"terms_pattern": {"to_q": 1}}, {}),
        ({"b_rank": 0}, "a whole number of at least 1, or None", {"b_rank": 1}, {}),
        ({"b_rank": 0}, "a whole number of at least 1, or None", {"b_rank": None}, {}),
        ({"dropout": 1}, "at least 0 and below 1", {"dropout": 0.99}, {}),
        ({"alpha": float("nan")}, "a finite number", {"alpha": -1.5}, {}),
        ({"init_weights": 1}, "True or False", {"init_weights": False}, {}),
    ],
)  # fmt: skip
def test_a_config_that_is_changed_as_the_text_says_adapts_what_was_meant(wrong, said, right, same_as):
    assert said in refusal(KronAConfig, **{**FIT, **wrong})
    assert layers_of(**right) == layers_of(**same_as)


@pytest.mark.parametrize("field", ["layout", "init_a", "init_b"])
def test_each_choice_that_the_text_names_is_taken(field):
    found = choices(refusal(KronAConfig, **{field: "nothing"}), f"{field} must be one of")
    assert len(found) > 1
    for choice in found:
        assert layers_of(**{"init_a": "normal", "init_b": "normal", field: choice}) == ALL


@pytest.mark.parametrize("random", ["init_a", "init_b"])
def test_one_random_factor_has_gradients(random):
    assert "Make one of them random" in refusal(KronAConfig, init_a="zeros", init_b="zeros")
    model = network()
    krona = inject_krona(model, KronAConfig(**{**FIT, "init_a": "zeros", "init_b": "zeros", random: "normal"}))
    model(*inputs()).sum().backward()
    assert any(bool(parameter.grad.any()) for parameter in krona.parameters())


def test_an_expression_that_takes_too_long_is_written_otherwise():
    slow = r"(\w+\.?)+(\w+\.?)+(\w+\.?)+(\w+\.?)+to_q"
    text = refusal(inject_krona, network(), KronAConfig(**FIT, target_modules=slow))
    assert "without repetitions within repetitions, or as a list of names" in text
    expected = ["blocks.0.to_q", "blocks.1.to_q"]
    assert layers_of(target_modules=r"(\w+\.)*to_q") == layers_of(target_modules=["to_q"]) == expected


# Layers


def test_layers_get_other_factors_or_are_left_out():
    wide = {"a1": 4, "a2": 24}  # to_k and to_v have 16 inputs
    text = refusal(inject_krona, network(), KronAConfig(**wide))
    named = re.findall(r"^  ([\w.]+): .*nearest factors that fit are \((\d+), (\d+)\)", text, re.MULTILINE)
    assert len(named) == 3
    assert "and 1 more" in text
    assert "factor_pattern={'name or regular expression': (a1, a2)}" in text
    endings = {name.rpartition(".")[2]: (int(a1), int(a2)) for name, a1, a2 in named}
    assert layers_of(**wide, factor_pattern=endings) == ALL
    assert "exclude_modules" in text
    assert layers_of(**wide, exclude_modules=list(endings)) == [
        name for name in ALL if name.rpartition(".")[2] not in endings
    ]


@pytest.mark.parametrize(
    ("layer", "fields"),
    [
        (nn.LayerNorm(8), {}),
        (nn.Conv2d(8, 8, 1, groups=2), {}),
        (nn.Conv2d(8, 8, 1), {"layout": "transposed"}),
    ],
    ids=["norm", "groups", "transposed"],
)
def test_a_layer_that_takes_no_factors_at_all_is_left_out(layer, fields):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    config = {**FIT, **fields, "target_modules": ["0", "1"]}
    assert "leave them out with exclude_modules" in refusal(inject_krona, model, KronAConfig(**config))
    inject_krona(model, KronAConfig(**config, exclude_modules=["1"]))
    assert list(krona_layers(model)) == ["0"]


@pytest.mark.parametrize("word", ["cross-attention", "attention+ff"])
def test_where_a_word_means_nothing_another_or_names_are_given(word):
    text = refusal(inject_krona, network(), KronAConfig(**FIT, target_modules=word))
    other = re.search(r'choose "([\w-]+)"', text)[1]
    assert layers_of(target_modules=other) == ALL
    assert "or name layers in target_modules" in text
    assert layers_of(target_modules=["to_k", "proj_in"]) == ["blocks.0.to_k", "blocks.1.to_k", "proj_in"]


# Names of adapters


@pytest.mark.parametrize("others", ["krona", "lora"])
def test_a_taken_name_is_another_or_the_adapter_is_taken_out(others):
    for way in ("give this one another adapter_name", "or take that one out first"):
        pipe = tiny_sd_pipeline()
        if others == "krona":
            inject_krona(pipe)
        else:
            pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"]), "default")
        assert way in refusal(inject_krona, pipe)
        if "another" in way:
            inject_krona(pipe, adapter_name="second")
            continue
        if others == "krona":
            unload_krona(pipe, "default")
        else:
            pipe.delete_adapters("default")
        inject_krona(pipe)


def test_a_name_of_pefts_own_injection_is_another():
    model = network()
    KronAModel(model, KronAConfig(**FIT), "default")
    assert "choose another name" in refusal(KronAModel, model, KronAConfig(**FIT), "default")
    with pytest.warns(UserWarning, match="peft_config"):
        KronAModel(model, KronAConfig(**FIT), "second")


@pytest.mark.parametrize("name", ["", "a.b", "keys"])
def test_a_name_is_none_of_what_the_text_tells(name):
    text = refusal(inject_krona, network(), KronAConfig(**FIT), name)
    assert "must not be empty, hold a dot, or be what torch's modules call something of their own" in text
    inject_krona(network(), KronAConfig(**FIT), "ab")


@pytest.mark.parametrize("way", ["inject_krona", "load_krona"])
def test_where_there_is_no_adapter_one_is_added(way, tmp_path):
    model, other = network(), network()
    inject_krona(other, KronAConfig(**FIT))
    saved = save_krona(other, tmp_path / "dog.safetensors")
    for function in (merge_krona, unload_krona):
        text = refusal(function, model, *(["default"] if function is unload_krona else []))
        assert way in re.search(r"add one with (.*)\.$", text)[1]
    if way == "inject_krona":
        inject_krona(model, KronAConfig(**FIT))
    else:
        load_krona(model, saved)
    merge_krona(model)


@pytest.mark.parametrize("wanted", [None, "third"])
def test_where_an_adapter_is_not_clear_one_of_those_that_the_text_names_is(wanted, tmp_path):
    model = network()
    for name in ("one", "two"):
        inject_krona(model, KronAConfig(**FIT), name)
    text = refusal(save_krona, model, tmp_path / "x.safetensors", wanted)
    for name in choices(text, "there are:"):
        save_krona(model, tmp_path / f"{name}.safetensors", name)
    assert {path.stem for path in tmp_path.iterdir()} == {"one", "two"}
    assert ("by adapter_name" in text) == (wanted is None)


# Weighted sums


def summed(**second: Any) -> Any:
    model = get_peft_model(network(), KronAConfig(**FIT, init_weights=False), "one")
    model.add_adapter("two", KronAConfig(**{**FIT, "init_weights": False, **second}))
    return model.base_model


def test_each_combination_that_the_text_names_makes_a_sum():
    model = summed()
    text = refusal(model.add_weighted_adapter, ["one", "two"], [1, 1], "sum", "linear")
    found = re.search(r"combination_type must be '(\w+)'.* or '(\w+)'", text).groups()
    for combination in found:
        model.add_weighted_adapter(["one", "two"], [1, 1], combination, combination)


@pytest.mark.parametrize(
    ("second", "wrong", "said", "right"),
    [
        ({"a2": 8}, {}, "the nearest is combination_type='svd'", {"combination_type": "svd"}),
        ({}, {"num_terms": 1}, "num_terms is for combination_type='svd'", {"num_terms": 1, "combination_type": "svd"}),
        ({}, {"num_terms": 1}, "'cat' takes the terms of all adapters", {}),
        ({}, {"num_terms": 0, "combination_type": "svd"}, "num_terms must be at least 1",
         {"num_terms": 1, "combination_type": "svd"}),
        ({}, {"adapter_name": "two"}, "give the sum another name", {}),
        ({}, {"adapters": ["one", "third"]}, "there are: one, two", {}),
        ({}, {"weights": [1]}, "adapters and as many weights", {}),
        ({}, {"weights": [1, float("inf")]}, "finite numbers", {}),
    ],
)  # fmt: skip
def test_a_sum_is_made_as_the_text_says(second, wrong, said, right):
    model, plain = summed(**second), {"adapters": ["one", "two"], "weights": [1, 0.5], "adapter_name": "sum"}
    assert said in refusal(model.add_weighted_adapter, **{**plain, **wrong})
    model.add_weighted_adapter(**{**plain, **right})
    assert "sum" in model.peft_config


# Merging


def test_weights_in_groups_files_are_merged_before_the_offloading(tmp_path):
    def offload(model: nn.Module) -> None:
        apply_group_offloading(
            model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level",
            offload_to_disk_path=str(tmp_path / "groups"),
        )  # fmt: skip

    pipe = tiny_sd_pipeline()
    inject_krona(pipe, KronAConfig(init_weights=False))
    offload(pipe.unet)
    assert "merge first, then apply the group offloading" in refusal(merge_krona, pipe)
    other = tiny_sd_pipeline()
    inject_krona(other, KronAConfig(init_weights=False))
    merge_krona(other)
    offload(other.unet)
    for layer in krona_layers(other.unet).values():
        assert layer.merged


class Packed(nn.Linear):
    """Keeps two rows in one, as some quantized layers do."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, bias=False)
        self.weight = nn.Parameter(source.weight.detach().reshape(-1, 2 * source.in_features), requires_grad=False)


class Int8(nn.Linear):
    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, bias=False)
        self.weight = nn.Parameter(source.weight.detach().to(torch.int8), requires_grad=False)


@pytest.mark.parametrize("kind", [Packed, Int8])
def test_an_adapter_of_a_base_that_cannot_be_written_merges_into_the_unquantized_one(kind, tmp_path):
    plain = nn.Linear(8, 8)
    model, whole = nn.Sequential(kind(plain)), nn.Sequential(plain)
    config = KronAConfig(**FIT, target_modules=["0"], init_weights=False)
    inject_krona(model, config)
    saved = save_krona(model, tmp_path / "dog.safetensors")
    assert "load the base unquantized" in refusal(merge_krona, model)
    load_krona(whole, saved)
    merge_krona(whole)


def test_a_model_is_cast_when_nothing_is_merged():
    def adapted() -> nn.Module:
        model = network()
        inject_krona(model, KronAConfig(**FIT, init_weights=False))
        merge_krona(model)
        return model

    lost = adapted()
    lost.to(torch.bfloat16)
    assert "cast only unmerged models" in refusal(unmerge_krona, lost)
    model = adapted()
    unmerge_krona(model)
    model.to(torch.bfloat16)
    merge_krona(model)
    unmerge_krona(model)


def test_adapters_of_samples_last_through_gradient_checkpointing_in_krona_batch_or_without_it():
    model = get_peft_model(network(), KronAConfig(**FIT, init_weights=False), "one")
    model.add_adapter("two", KronAConfig(**FIT, init_weights=False))
    names, block = ["one", "two"], model.base_model.model.blocks[0]
    block.gradient_checkpointing = True
    assert "turn that off, or use krona_batch" in refusal(model, *inputs(), adapter_names=names)
    with krona_batch(model, names):
        found = model(*inputs())
    block.gradient_checkpointing = False
    assert torch.equal(model(*inputs(), adapter_names=names), found)


def test_a_batch_of_adapters_is_possible_once_merged_ones_are_unmerged():
    model = network()
    inject_krona(model, KronAConfig(**FIT))
    merge_krona(model)
    with pytest.raises(BatchError, match="unmerge them first"), krona_batch(model, ["default", None]):
        pass
    unmerge_krona(model)
    with krona_batch(model, ["default", None]):
        model(*inputs())


def test_merged_adapters_are_named_in_a_list():
    model = network()
    inject_krona(model, KronAConfig(**FIT))
    merge_krona(model)
    layer = next(iter(krona_layers(model).values()))
    with pytest.raises(TypeError, match="a list of strings"):
        layer.unmerge("default")
    layer.unmerge(["default"])
    assert not layer.merged


def test_a_model_is_a_module_or_a_pipeline_with_a_denoiser():
    text = refusal(inject_krona, object())
    assert "a torch module or a Diffusers pipeline with a `unet` or `transformer`" in text
    inject_krona(tiny_sd_pipeline())
    inject_krona(network(), KronAConfig(**FIT))
