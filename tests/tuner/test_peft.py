"""What PEFT's own test suite asks of a method, asked of KronA: on an MLP, CLIP, a decoder and a UNet.

`test_model.py` asks the most usual of it on a network of attention projections.
"""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    convert_to_lora,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils import get_base_model_state_dict, set_base_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from diffusekrona import KronAConfig
from diffusekrona.errors import AdapterNameError, BatchError, ConfigError, FactorShapeError, MergeError
from diffusekrona.tuner.injected import krona_layers
from tests.kinds import (
    CLIP,
    DECODER,
    MLP,
    TOKENS,
    UNET,
    Kind,
    assert_base,
    assert_computes,
    dense,
    factors,
    forms,
    half_types,
    kinds,
    lora,
    numbers,
    output,
    quiet,
    same_factors,
    trainable,
    weights,
    with_gradients,
)
from tests.snapshots import unchanged

pytestmark = quiet


# The update


@kinds
@forms
def test_the_model_computes_the_base_with_the_update(kind: Kind, form: dict[str, Any]) -> None:
    assert_computes(kind, kind.adapted(**form), default=1.0)


@kinds
@forms
def test_training_changes_the_factors_and_nothing_else(kind: Kind, form: dict[str, Any]) -> None:
    model = kind.adapted(**form).train()
    before, old = weights(model), copy.deepcopy(factors(model))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        loss = with_gradients(kind, model).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert weights(model) == before
    assert all(not torch.equal(old[key], factor) for key, factor in factors(model).items())


@kinds
def test_a_model_that_a_test_perturbs_has_every_layer_adapted(kind: Kind) -> None:
    # What the other tests stand on: each target is found, and linear layers and convolutions are.
    adapted = krona_layers(kind.adapted())
    assert all(any(name.endswith(target) for name in adapted) for target in kind.targets)
    assert all(hasattr(layer, "in_features") and hasattr(layer, "out_features") for layer in adapted.values())


# Which layers


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"target_modules": r".*layers\.1\..*(q|v)_proj"}, ["1.q_proj", "1.v_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, ["1.q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, ["0.q_proj"]),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*0\.self_attn.*"}, ["1.q_proj", "1.o_proj"]),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]}, ["0.q_proj", "1.q_proj"]),
    ],
    ids=str,
)
def test_the_config_chooses_a_decoders_layers(fields: dict[str, Any], found: list[str]) -> None:
    model = DECODER.adapted(**fields)
    names = [name.removeprefix("base_model.model.model.layers.") for name in krona_layers(model)]
    assert [name.replace("self_attn.", "") for name in names] == found
    assert_computes(DECODER, model, default=1.0)


def test_only_the_indexed_layers_are_trained() -> None:
    model = CLIP.adapted(layers_to_transform=[1])
    with_gradients(CLIP, model).square().mean().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained
    assert all(".layers.1." in name and ".krona_" in name for name in trained)


@pytest.mark.parametrize("kind", [CLIP, DECODER], ids=["clip", "decoder"])
def test_all_linear_finds_the_same_layers_again_for_a_second_adapter(kind: Kind) -> None:
    model = kind.adapted(target_modules="all-linear")
    model.add_adapter("other", kind.config(target_modules="all-linear"))
    assert all(list(layer.krona_A) == ["default", "other"] for layer in krona_layers(model).values())
    assert not any("lm_head" in name for name in krona_layers(model))
    inject_adapter_in_model(lora(kind, target_modules="all-linear"), model.get_base_model(), "lora")
    assert all(".base_layer" in name for name in krona_layers(model))


@kinds
def test_an_adapter_can_be_put_in_where_a_state_dict_says(kind: Kind) -> None:
    model = inject_adapter_in_model(kind.config(), kind.base())
    tensors = get_peft_model_state_dict(model)
    some = dict(list(tensors.items())[:2])
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        found = inject_adapter_in_model(kind.config(), kind.base(), state_dict=some)
    assert [f"{name}.krona_A" for name in krona_layers(found)] == list(some)[:1]
    other = inject_adapter_in_model(kind.config(), kind.base(), low_cpu_mem_usage=True, state_dict=tensors)
    set_peft_model_state_dict(other, tensors, low_cpu_mem_usage=True)
    assert torch.equal(output(kind, other), output(kind, model))


@pytest.mark.filterwarnings("ignore:While injecting")
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_that_a_state_dict_leaves_out_need_not_fit(compiled: bool) -> None:
    base = torch.compile(MLP.base()) if compiled else MLP.base()
    config, tensors = MLP.config(a2=8), {"lin0.krona_A": numbers(2, 8), "lin0.krona_B": numbers(8, 4)}
    with unchanged(base), pytest.raises(FactorShapeError, match="krona_conv: a2=8"):
        inject_adapter_in_model(config, base, state_dict={**tensors, "krona_conv.krona_A": numbers(2, 8)})
    found = inject_adapter_in_model(config, base, state_dict=tensors)
    assert [name.removeprefix("_orig_mod.") for name in krona_layers(found)] == ["lin0"]


# Saving and loading


@kinds
@forms
def test_an_adapter_is_saved_and_loaded_bit_for_bit(kind: Kind, form: dict[str, Any], tmp_path: Path) -> None:
    model = kind.adapted(**form)
    model.save_pretrained(tmp_path)
    for options in ({"torch_device": "cpu"}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(kind.base(), tmp_path, **options)
        assert same_factors(loaded, model)
        assert torch.equal(output(kind, loaded), output(kind, model))
        assert trainable(loaded) == set()


@kinds
def test_modules_to_save_are_saved_and_loaded(kind: Kind, tmp_path: Path) -> None:
    model = kind.adapted(modules_to_save=[kind.copied])
    trained = [p for name, p in model.named_parameters() if ".modules_to_save." in name]
    assert trained
    for parameter in trained:
        assert parameter.requires_grad
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(kind.base(), tmp_path, **options)
        assert torch.equal(output(kind, loaded), output(kind, model))
        with loaded.disable_adapter():
            assert_base(kind, loaded)
        assert torch.equal(output(kind, loaded.merge_and_unload()), output(kind, model.merge_and_unload()))
        model = PeftModel.from_pretrained(kind.base(), tmp_path)


@kinds
def test_the_file_holds_the_adapter_alone_under_names_without_its_own(kind: Kind, tmp_path: Path) -> None:
    model = kind.adapted("mine")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "mine/adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.") for key in tensors} == set(factors(model, "mine"))
    config = PeftConfig.from_pretrained(tmp_path / "mine")
    assert isinstance(config, KronAConfig)
    expected = {**model.peft_config["mine"].to_dict(), "inference_mode": True}
    assert {**config.to_dict(), "auto_mapping": None} == expected
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card


def test_a_pickle_is_written_and_read_on_demand(tmp_path: Path) -> None:
    model = MLP.adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    assert same_factors(PeftModel.from_pretrained(MLP.base(), tmp_path), model)


@kinds
def test_only_the_selected_adapters_are_saved(kind: Kind, tmp_path: Path) -> None:
    model = kind.adapted()
    model.add_adapter("other", kind.config(num_terms=2))
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both/adapter_model.safetensors").exists()
    assert (tmp_path / "both/other/adapter_model.safetensors").exists()
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one/adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path / "one/other")
    assert same_factors(loaded, model, name="other") or same_factors(model, loaded, "other", "default")
    with pytest.raises(ValueError, match="selected"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["unknown"])


NAMES = ["a", "default", "default_2", "2", "lin", "proj", "base", "krona"]


@kinds
def test_names_that_hold_one_another_are_told_apart(kind: Kind, tmp_path: Path) -> None:
    model = kind.adapted(NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, kind.config(num_terms=1 + len(name) % 2))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path / NAMES[-1], NAMES[-1])
    for name in NAMES[:-1]:
        loaded.load_adapter(tmp_path / ("" if name == "default" else name), name)
    for name in NAMES:
        assert same_factors(loaded, model, name, name)
    for name in NAMES[:-1]:
        loaded.delete_adapter(name)
    assert all(list(layer.krona_A) == NAMES[-1:] for layer in krona_layers(loaded).values())
    loaded.set_adapter(NAMES[-1])
    assert_computes(kind, loaded, **{NAMES[-1]: 1.0})


@half_types
@pytest.mark.parametrize("lazily", [False, True], ids=["at once", "low_cpu_mem_usage"])
def test_loading_into_half_precision_keeps_the_factors_bits(dtype: torch.dtype, lazily: bool, tmp_path: Path) -> None:
    model = MLP.adapted()
    model.save_pretrained(tmp_path)
    base = MLP.base().to(dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=lazily)
    assert same_factors(loaded, model)
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=lazily)
    assert same_factors(loaded, model, "other")
    injected = inject_adapter_in_model(MLP.config(), MLP.base().to(dtype), low_cpu_mem_usage=lazily)
    set_peft_model_state_dict(injected, get_peft_model_state_dict(model), low_cpu_mem_usage=lazily)
    assert same_factors(injected, model)


def test_an_adapter_of_other_shapes_does_not_load(tmp_path: Path) -> None:
    MLP.adapted().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, "a1": 4}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(MLP.base(), tmp_path)


@pytest.mark.parametrize("kind", [MLP, DECODER], ids=["mlp", "decoder"])
@pytest.mark.parametrize("compiled", ["saved", "loaded", "both"])
def test_a_compiled_model_saves_and_loads(kind: Kind, compiled: str, tmp_path: Path) -> None:
    base = kind.base()
    torch.manual_seed(1)
    model = get_peft_model(torch.compile(base) if compiled != "loaded" else base, kind.config())
    model.save_pretrained(tmp_path)
    base = kind.base()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        loaded = PeftModel.from_pretrained(torch.compile(base) if compiled != "saved" else base, tmp_path)
    assert same_factors(loaded, model)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{key}" for key in factors(kind.adapted())
    }


def test_a_compiled_peft_model_saves(tmp_path: Path) -> None:
    model = MLP.adapted()
    torch.compile(model).save_pretrained(tmp_path)
    assert same_factors(PeftModel.from_pretrained(MLP.base(), tmp_path), model)


@kinds
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_a_copy_and_a_pickle_are_equal_and_independent(
    kind: Kind, clone: Callable[[nn.Module], Any], merged: bool
) -> None:
    model = kind.adapted(modules_to_save=[kind.copied])
    before = weights(model)
    if merged:
        model.merge_adapter()
    twin = clone(model)
    assert torch.equal(output(kind, twin), output(kind, model))
    if merged:
        twin.unmerge_adapter()
    assert weights(twin) == before
    kept = output(kind, model)
    for factor in factors(twin).values():
        nn.init.zeros_(factor)
    assert torch.equal(output(kind, model), kept)
    assert not torch.equal(output(kind, twin), kept)


# Several adapters


@kinds
def test_several_adapters_are_loaded_switched_and_added_up(kind: Kind, tmp_path: Path) -> None:
    other = kind.adapted(seed=2, num_terms=2, target_modules=list(kind.targets[:2]))
    other.save_pretrained(tmp_path)
    model = kind.adapted()
    alone = output(kind, model)
    model.load_adapter(tmp_path, "other")
    assert torch.equal(output(kind, model), alone)
    model.set_adapter("other")
    assert torch.equal(output(kind, model), output(kind, other))
    model.base_model.set_adapter(["default", "other"])
    assert_computes(kind, model, default=1.0, other=1.0)
    model.set_adapter("default")
    assert torch.equal(output(kind, model), alone)


@kinds
def test_disabling_gives_the_base_also_of_what_is_merged(kind: Kind) -> None:
    model = kind.adapted()
    expected = output(kind, model)
    with model.disable_adapter():
        assert_base(kind, model)
    assert torch.equal(output(kind, model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert_base(kind, model)
    torch.testing.assert_close(output(kind, model), expected, rtol=1e-4, atol=1e-5)


def test_leaving_the_disabled_block_leaves_disabled_what_was_disabled() -> None:
    model = MLP.adapted()
    model.base_model.disable_adapter_layers()
    assert not get_model_status(model).enabled
    with model.disable_adapter():
        pass
    assert not get_model_status(model).enabled
    model.base_model.enable_adapter_layers()
    assert_computes(MLP, model, default=1.0)


@kinds
@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
def test_deleting_an_adapter_leaves_nothing_of_it(kind: Kind, active: bool) -> None:
    model = kind.adapted()
    model.add_adapter("other", kind.config(b_rank=1))
    deleted, kept = ("default", "other") if active else ("other", "default")
    model.set_adapter(kept)
    expected = output(kind, model)
    model.set_adapter("default")
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [kept]
    assert model.active_adapters == [kept]
    assert torch.equal(output(kind, model), expected)
    for layer in krona_layers(model).values():
        holders = [
            one for one in (*vars(layer).values(), *layer.children()) if isinstance(one, (dict, nn.ParameterDict))
        ]
        assert sum(kept in holder for holder in holders) >= 6
        assert not any(deleted in holder for holder in holders)
    assert not any(deleted in name.split(".") for name in model.state_dict())


def test_deleting_what_is_merged_or_unknown_is_an_error_that_changes_nothing() -> None:
    model = MLP.adapted()
    model.add_adapter("other", MLP.config())
    model.merge_adapter(["other"])
    for name, message in (("other", "Please unmerge"), ("unknown", "does not exist")):
        with unchanged(model), pytest.raises(ValueError, match=message):
            model.delete_adapter(name)
    model.delete_adapter("default")
    model.unmerge_adapter()
    assert weights(model) == weights(MLP.base())


@kinds
def test_adapters_on_different_layers_do_not_touch_each_other(kind: Kind) -> None:
    first, *others = kind.targets
    model = kind.adapted(target_modules=[first])
    alone = output(kind, model)
    model.add_adapter("other", kind.config(target_modules=others))
    assert torch.equal(output(kind, model), alone)
    model.set_adapter("other")
    assert_computes(kind, model, other=1.0)
    model.delete_adapter("default")
    assert_computes(kind, model, other=1.0)


@pytest.mark.parametrize("targets", [["krona_conv"], ["lin0", "lin1_default"]], ids=str)
def test_after_the_active_adapter_is_deleted_one_other_is_active_everywhere(targets: list[str]) -> None:
    model = MLP.adapted("z", target_modules=targets)
    model.add_adapter("a", MLP.config(target_modules=targets[:1]))
    model.add_adapter("b", MLP.config(target_modules=targets))
    model.delete_adapter("z")
    assert model.active_adapters == get_model_status(model).active_adapters == ["a"]
    assert_computes(MLP, model, a=1.0)
    assert trainable(model) == {"a"}
    model.delete_adapter("b")
    model.delete_adapter("a")
    assert model.active_adapters == []
    assert_base(MLP, model.base_model)


@kinds
def test_each_adapter_has_copies_of_modules_of_its_own(kind: Kind) -> None:
    model = kind.adapted(modules_to_save=[kind.copied])
    model.add_adapter("other", kind.config())
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter)
    with_copy = output(kind, model)
    model.set_adapter("other")
    assert_computes(kind, model, other=1.0)
    model.set_adapter("default")
    assert torch.equal(output(kind, model), with_copy)
    model.delete_adapter("default")
    assert_computes(kind, model, other=1.0)


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
def test_a_name_that_is_taken_is_an_error_that_changes_nothing(mixed: bool) -> None:
    model = get_peft_model(MLP.base(), MLP.config(), "mine", mixed=mixed)
    with unchanged(model), pytest.raises(ValueError, match="already exists"):
        model.add_adapter("mine", MLP.config(a1=4))


def test_two_adapters_with_copies_of_one_module_are_not_active_together() -> None:
    model = MLP.adapted(modules_to_save=["head"])
    model.add_adapter("other", MLP.config(modules_to_save=["head"]))
    with pytest.raises(ValueError, match="Only one adapter"):
        model.base_model.set_adapter(["default", "other"])


@kinds
def test_the_bases_weights_are_read_and_set_under_its_own_names(kind: Kind) -> None:
    model, base = kind.adapted(modules_to_save=[kind.copied]), kind.base()
    found = get_base_model_state_dict(model)
    assert found.keys() == base.state_dict().keys()
    set_base_model_state_dict(model, {key: torch.zeros_like(tensor) for key, tensor in found.items()})
    assert not any(tensor.any() for tensor in get_base_model_state_dict(model).values())
    assert all(bool(factor.any()) for factor in factors(model).values())


# What requires gradients, and what PEFT reports


@kinds
def test_the_active_adapters_and_no_others_require_gradients(kind: Kind) -> None:
    model = kind.adapted()
    assert trainable(model) == {"default"}
    model.add_adapter("other", kind.config(num_terms=2))
    assert trainable(model) == {"default"}
    model.set_adapter("other")
    assert trainable(model) == {"other"}
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()
    model.base_model.set_adapter(["default", "other"])
    assert trainable(model) == {"default", "other"}
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == {"default", "other"}
    model.set_requires_grad("other", False)
    assert trainable(model) == {"default"}
    model.set_requires_grad(["default", "other"])
    assert trainable(model) == {"default", "other"}
    model.delete_adapter("other")
    assert trainable(model) == {"default"}


@kinds
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_a_loaded_adapter_requires_gradients_as_asked(kind: Kind, train: bool, tmp_path: Path) -> None:
    kind.adapted(modules_to_save=[kind.copied]).save_pretrained(tmp_path)
    for lazily in (False, True):
        model = PeftModel.from_pretrained(kind.base(), tmp_path, is_trainable=train, low_cpu_mem_usage=lazily)
        found = trainable(model)
        assert ("default" in found) == train
        assert all(".modules_to_save.default." in name for name in found - {"default"})
        assert bool(found - {"default"}) == train


@half_types
def test_a_frozen_adapter_of_half_precision_stays_frozen(dtype: torch.dtype, tmp_path: Path) -> None:
    model = MLP.adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    loaded = PeftModel.from_pretrained(MLP.base(), tmp_path, low_cpu_mem_usage=True)
    assert trainable(loaded) == set()
    assert {factor.dtype for factor in factors(loaded).values()} == {torch.float32}


@kinds
def test_layer_status_and_model_status_tell_what_is(kind: Kind) -> None:
    model = kind.adapted()
    model.add_adapter("other", kind.config(target_modules=[kind.targets[0]]))
    layers = get_layer_status(model)
    assert {status.module_type for status in layers} <= {"KronALinear", "KronAConv2d"}
    assert {tuple(status.available_adapters) for status in layers} >= {("default", "other")}
    status = get_model_status(model)
    assert (status.adapter_model_type, status.peft_types) == ("KronAModel", {"default": "KRONA", "other": "KRONA"})
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.num_adapter_layers == len(layers) == len(krona_layers(model))
    assert status.requires_grad == {"default": True, "other": False}
    assert status.trainable_params == sum(factor.numel() for factor in factors(model).values())
    assert status.total_params == sum(parameter.numel() for parameter in model.parameters())
    model.merge_adapter(["default"])
    assert get_model_status(model).merged_adapters == ["default"]
    with model.disable_adapter():
        assert not get_model_status(model).enabled
    next(iter(krona_layers(model).values())).set_adapter("other")
    assert get_model_status(model).active_adapters == "irregular"


# Merging


@kinds
@forms
def test_merging_computes_the_same_and_unmerging_restores_every_bit(kind: Kind, form: dict[str, Any]) -> None:
    model = kind.adapted(**form)
    before, expected = weights(model), output(kind, model)
    model.merge_adapter()
    torch.testing.assert_close(output(kind, model), expected, rtol=1e-3, atol=1e-4)
    merged = weights(model)
    assert merged != before
    model.merge_adapter(safe_merge=True)
    assert weights(model) == merged
    model.unmerge_adapter()
    assert weights(model) == before == weights(kind.base())
    assert torch.equal(output(kind, model), expected)


@kinds
@forms
def test_merge_and_unload_leaves_the_plain_model_with_the_update(kind: Kind, form: dict[str, Any]) -> None:
    model = kind.adapted(**form)
    expected = output(kind, model)
    plain = model.merge_and_unload(safe_merge=True)
    assert [type(module) for module in plain.modules()] == [type(module) for module in kind.base().modules()]
    assert plain.state_dict().keys() == kind.base().state_dict().keys()
    assert all(tensor.is_contiguous() for tensor in plain.state_dict().values())
    assert not hasattr(plain, "peft_config")
    torch.testing.assert_close(output(kind, plain), expected, rtol=1e-3, atol=1e-4)


@kinds
def test_unload_leaves_the_base_bit_for_bit(kind: Kind) -> None:
    model = kind.adapted()
    model.add_adapter("other", kind.config())
    assert weights(model.unload()) == weights(kind.base())


@kinds
def test_adapters_merge_one_after_the_other_as_all_at_once(kind: Kind) -> None:
    models = [kind.adapted() for _ in range(2)]
    for model in models:
        torch.manual_seed(3)
        model.add_adapter("other", kind.config(num_terms=2, alpha=0.3))
    models[0].merge_adapter(["default", "other"])
    for name in ("other", "default"):
        models[1].merge_adapter([name])
    assert_computes(kind, models[0], default=1.0, other=1.0)
    torch.testing.assert_close(output(kind, models[0]), output(kind, models[1]), rtol=1e-4, atol=1e-5)
    for model in models:
        model.unmerge_adapter()
        assert weights(model) == weights(kind.base())


@kinds
def test_only_the_named_adapters_are_merged_and_unloaded(kind: Kind) -> None:
    model = kind.adapted()
    model.add_adapter("other", kind.config())
    expected = dense(kind, model, {"other": 1.0})
    plain = model.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(output(kind, plain).double(), output(kind, expected), rtol=1e-3, atol=1e-4)


@kinds
def test_an_adapter_added_after_merging_finds_the_base_weights(kind: Kind) -> None:
    model = kind.adapted()
    model.merge_adapter()
    model.add_adapter("other", kind.config(num_terms=2))
    assert weights(model) == weights(kind.base())
    model.set_adapter("other")
    assert_computes(kind, model, other=1.0)
    plain = model.merge_and_unload()
    again = get_peft_model(plain, kind.config(), "again")
    assert again.active_adapters == ["again"]
    assert list(again.peft_config) == ["again"]


@kinds
@half_types
def test_half_precision_merges(kind: Kind, dtype: torch.dtype) -> None:
    model = get_peft_model(kind.base().to(dtype), kind.config(alpha=0.1))
    before, expected = weights(model), output(kind, model)
    assert expected.dtype == dtype
    model.merge_adapter()
    torch.testing.assert_close(output(kind, model), expected, rtol=0.1, atol=0.1)
    model.unmerge_adapter()
    assert weights(model) == before
    assert bool(torch.isfinite(output(kind, model.merge_and_unload())).all())


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe merge"])
def test_a_factor_that_is_not_finite_is_not_merged(kind: Kind, value: float, safe: bool) -> None:
    model = kind.adapted()
    next(iter(factors(model).values())).data.view(-1)[0] = value
    with unchanged(model), pytest.raises(MergeError, match="infinity or a NaN"):
        model.merge_and_unload(safe_merge=safe)
    with pytest.raises(ValueError, match="infinity or a NaN"):
        model.merge_adapter(safe_merge=safe)
    assert weights(model) == weights(kind.base())


# Precision


@kinds
@half_types
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "as the base"])
@pytest.mark.parametrize("lazily", [False, True], ids=["at once", "low_cpu_mem_usage"])
def test_factors_are_fp32_or_as_asked_of_the_bases_dtype(
    kind: Kind, dtype: torch.dtype, autocast: bool, lazily: bool, tmp_path: Path
) -> None:
    options = {"autocast_adapter_dtype": autocast}
    model = get_peft_model(kind.base().to(dtype), kind.config(b_rank=1), **options)
    model.add_adapter("other", kind.config(), **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.base().to(dtype), tmp_path, low_cpu_mem_usage=lazily, **options)
    loaded.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=lazily, **options)
    for found in (model, loaded):
        for name in ("default", "other"):
            assert {factor.dtype for factor in factors(found, name).values()} == {torch.float32 if autocast else dtype}
    assert trainable(model) == {"default"}
    assert trainable(loaded) == set()
    assert output(kind, loaded).dtype == dtype
    assert torch.equal(output(kind, loaded), output(kind, model))
    with_gradients(kind, model).float().square().mean().backward()
    assert {factor.grad.dtype for factor in factors(model).values()} == {torch.float32 if autocast else dtype}


@kinds
def test_autocast_runs_forward_and_backward(kind: Kind) -> None:
    model = kind.adapted()
    expected = output(kind, model)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(kind, model)
        found.float().square().mean().backward()
    torch.testing.assert_close(found.detach().float(), expected, rtol=0.1, atol=0.1)
    assert all(factor.grad.dtype == torch.float32 for factor in factors(model).values())


# Memory: checkpointing, and bases that are prepared for training


@pytest.mark.parametrize("kind", [CLIP, DECODER, UNET], ids=["clip", "decoder", "unet"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind: Kind, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        base = kind.base()
        if checkpointed and kind is UNET:
            base.enable_gradient_checkpointing()
        elif checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        model = get_peft_model(base, kind.config()).train()
        with_gradients(kind, model).square().mean().backward()
        gradients.append({key: factor.grad for key, factor in factors(model).items()})
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


def test_a_base_prepared_for_training_in_few_bits_trains_the_adapter() -> None:
    base = prepare_model_for_kbit_training(DECODER.base().to(torch.bfloat16))
    assert trainable(base) == set()
    model = get_peft_model(base, DECODER.config()).train()
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(TOKENS).requires_grad
    with_gradients(DECODER, model).square().mean().backward()
    assert all(bool(factor.grad.any()) for factor in factors(model).values())


# Generation


def test_generation_uses_the_adapter() -> None:
    model, options = DECODER.adapted(alpha=4.0), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = DECODER.base().generate(TOKENS, **options)
    found = model.generate(TOKENS, **options)
    assert torch.equal(model.generate(input_ids=TOKENS, **options), found)
    assert not torch.equal(found, plain)
    with model.disable_adapter():
        assert torch.equal(model.generate(TOKENS, **options), plain)
    assert torch.equal(model.merge_and_unload().generate(TOKENS, **options), found)


def test_a_model_for_a_task_generates_trains_and_takes_embeddings() -> None:
    model = DECODER.adapted(task_type="CAUSAL_LM")
    assert isinstance(model, PeftModelForCausalLM)
    embedded = model.get_input_embeddings()(TOKENS)
    expected = output(DECODER, model)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, expected)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(bool(factor.grad.any()) for factor in factors(model).values())
    assert model.generate(input_ids=TOKENS, max_new_tokens=3, pad_token_id=0).shape == (2, 13)


def test_a_classifiers_head_is_trained_in_full(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = LlamaConfig(vocab_size=40, num_labels=2, pad_token_id=0, **sizes)
    kind = Kind(lambda: LlamaForSequenceClassification(settings), {"input_ids": TOKENS}, ("q_proj",), "score")
    model = kind.adapted(task_type="SEQ_CLS")
    assert trainable(model) == {"default", "base_model.model.score.modules_to_save.default.weight"}
    nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path)
    assert torch.equal(output(kind, loaded), output(kind, model))
    loaded.load_adapter(tmp_path, "other")
    with pytest.raises(ConfigError, match="modules_to_save in common"):
        loaded.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_generation_in_half_precision() -> None:
    model = get_peft_model(DECODER.base().to(torch.bfloat16), DECODER.config())
    assert model.generate(TOKENS, max_new_tokens=3, pad_token_id=0).shape == (2, 13)


def alone(kind: Kind, model: Any, name: str) -> Any:
    """The output of a model with one adapter, or by itself."""
    if name == "__base__":
        with model.disable_adapter():
            return output(kind, model)
    model.set_adapter(name)
    return output(kind, model)


@pytest.mark.parametrize("names", [["default", "other"], ["__base__", "default"], ["other", "other"]])
def test_each_sample_of_a_batch_may_have_its_own_adapter(names: list[str]) -> None:
    model = DECODER.adapted(init_weights=False)
    model.add_adapter("other", DECODER.config(init_weights=False, a1=2, a2=2))
    model.eval()
    found = model(TOKENS, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], alone(DECODER, model, name)[row])
    assert torch.equal(model(TOKENS).logits, model(TOKENS, adapter_names=None).logits)
    with pytest.raises(AdapterNameError, match="adapter_names has 'third', which no adapter is named"):
        model(TOKENS, adapter_names=["default", "third"])
    with pytest.raises(BatchError, match="3 adapters are given, one for each sample, but a layer's input has 2 rows"):
        model(TOKENS, adapter_names=[*names, "default"])


@pytest.mark.parametrize("beams", [1, 3])
def test_each_sample_is_generated_with_its_own_adapter(beams: int) -> None:
    model = DECODER.adapted(init_weights=False)
    model.add_adapter("other", DECODER.config(init_weights=False))
    options = {"max_new_tokens": 4, "pad_token_id": 0, "num_beams": beams, "do_sample": False}
    found = model.generate(input_ids=TOKENS, adapter_names=["other", "default"], **options)
    for row, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        assert torch.equal(found[row], model.generate(input_ids=TOKENS, **options)[row])


def test_names_do_not_last_until_gradient_checkpointing_computes_anew() -> None:
    model = DECODER.adapted()
    model.train()
    model.base_model.model.gradient_checkpointing_enable()
    with pytest.raises(BatchError, match="turn that off, or use krona_batch"):
        model(TOKENS, adapter_names=["default", "default"])


# Conversion to LoRA


@pytest.mark.parametrize("kind", [CLIP, DECODER], ids=["clip", "decoder"])
@forms
def test_an_adapter_converts_to_a_lora_that_computes_the_same(kind: Kind, form: dict[str, Any], tmp_path: Path) -> None:
    model = kind.adapted(**form)
    config, tensors = convert_to_lora(model, rank=16)
    base = get_peft_model(kind.base(), config)
    set_peft_model_state_dict(base, tensors)
    torch.testing.assert_close(output(kind, base), output(kind, model), rtol=1e-3, atol=1e-4)
    small = convert_to_lora(model, rank=0.5)[1]
    assert 0 < sum(tensor.numel() for tensor in small.values()) < sum(tensor.numel() for tensor in tensors.values())


def test_a_convolutions_adapter_does_not_convert_to_lora() -> None:
    with pytest.raises(TypeError, match="KronAConv2d"):
        convert_to_lora(MLP.adapted(), rank=2)
    assert convert_to_lora(MLP.adapted(target_modules=["lin0"]), rank=2)[1]
