"""Which modules of a pipeline an adapter goes into."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from diffusekrona import KronAConfig, inject_krona
from diffusekrona.errors import AdapterNameError, KronAError
from diffusekrona.tuner.components import (
    adaptable_components,
    adapter_names,
    all_modules,
    check_free_name,
    forget,
    is_pipeline,
    mark_adapted,
    named_adapter,
    remember,
    restore,
)
from diffusekrona.tuner.names import is_denoiser
from tests.modules import network
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.snapshots import assert_same, snapshot


def config(**fields: Any) -> KronAConfig:
    return KronAConfig(**{"a1": 2, "a2": 8, **fields})


def fake_pipeline(**components: Any) -> SimpleNamespace:
    return SimpleNamespace(components=components)


def test_a_pipelines_denoiser_comes_before_its_text_encoders() -> None:
    pipe = tiny_sdxl_pipeline()
    assert list(adaptable_components(pipe)) == ["unet", "text_encoder", "text_encoder_2"]
    assert adaptable_components(pipe)["unet"] is pipe.unet
    text, transformer = nn.Linear(1, 1), nn.Linear(1, 1)
    found = adaptable_components(fake_pipeline(text_encoder_3=text, vae=network(), transformer=transformer))
    assert list(found.items()) == [("transformer", transformer), ("text_encoder_3", text)]


def test_a_component_that_a_pipeline_was_made_without_does_not_count() -> None:
    model = network()
    assert adaptable_components(fake_pipeline(unet=model, text_encoder=None)) == {"unet": model}


def test_a_single_module_has_no_component_name() -> None:
    model = network()
    assert adaptable_components(model) == {"": model}
    assert all_modules(model) == [model]


def test_wrappers_of_peft_and_torch_compile_are_looked_through() -> None:
    model = network()
    compiled = torch.compile(model)
    assert adaptable_components(compiled) == {"": model}
    assert adaptable_components(fake_pipeline(unet=compiled)) == {"unet": model}
    wrapped = get_peft_model(model, config())
    assert adaptable_components(wrapped) == {"": model}
    assert adaptable_components(torch.compile(wrapped)) == {"": model}
    assert all_modules(fake_pipeline(unet=wrapped, vae=compiled)) == [model, model]


@pytest.mark.parametrize("thing", [None, "unet", 3, {"unet": network()}, fake_pipeline(vae=network())])
def test_anything_else_is_an_error_that_says_what_it_is(thing: Any) -> None:
    with pytest.raises(KronAError, match=f"`unet` or `transformer`, got {type(thing).__name__}"):
        adaptable_components(thing)


def test_a_module_with_components_is_a_module() -> None:
    class Composed(nn.Module):
        components: dict[str, nn.Module] = {}  # noqa: RUF012

    assert not is_pipeline(Composed())
    assert is_pipeline(tiny_sd_pipeline())
    assert not is_pipeline(SimpleNamespace(components=["unet"]))


def test_all_modules_of_a_pipeline_are_those_that_are_not_adapted_too() -> None:
    pipe = tiny_sd_pipeline()
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {id(module) for module in all_modules(pipe)} == {id(part) for part in parts}


@pytest.mark.parametrize(
    ("component", "denoiser"), [("", True), ("unet", True), ("transformer", True), ("text_encoder", False)]
)
def test_denoisers(component: str, denoiser: bool) -> None:
    assert is_denoiser(component) is denoiser


def test_adapter_names_are_krona_adapters_oldest_first() -> None:
    pipe = tiny_sd_pipeline()
    assert adapter_names(pipe.unet) == []
    for name in ("one", "lora", "two"):
        pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"]) if name == "lora" else config(), name)
    assert adapter_names(pipe.unet) == ["one", "two"]


def test_named_adapter_finds_the_only_one_or_the_one_that_is_named() -> None:
    pipe = tiny_sd_pipeline()
    components = adaptable_components(pipe)
    with pytest.raises(AdapterNameError, match="add one with inject_krona or load_krona"):
        named_adapter(components, None)
    pipe.text_encoder.add_adapter(config(), "one")
    assert named_adapter(components, None) == "one"
    pipe.unet.add_adapter(config(), "one")
    assert named_adapter(components, None) == "one"
    pipe.unet.add_adapter(config(), "two")
    assert named_adapter(components, "two") == "two"
    with pytest.raises(AdapterNameError, match="Say by adapter_name which adapter is meant; there are: one, two"):
        named_adapter(components, None)
    with pytest.raises(AdapterNameError, match="No KronA adapter is named 'three'; there are: one, two"):
        named_adapter(components, "three")


@pytest.mark.parametrize("name", ["", "a.b", "keys", "train", "training", "pop", "to"])
def test_names_that_torch_modules_cannot_have_as_a_key_are_not_free(name: str) -> None:
    with pytest.raises(AdapterNameError, match="cannot be named"):
        check_free_name([], name)


def test_names_of_any_methods_adapter_are_not_free() -> None:
    pipe = tiny_sd_pipeline()
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"]), "mine")
    components = [pipe.text_encoder, pipe.unet]
    check_free_name(components, "yours")
    with pytest.raises(AdapterNameError, match="UNet2DConditionModel already has an adapter named 'mine'"):
        check_free_name(components, "mine")


def test_restore_makes_trainable_what_was_trainable_when_remembered() -> None:
    model, other = network(), network()
    model.proj_in.requires_grad_(False)
    before = snapshot(model)
    assert remember([model, other]) == [model, other]
    model.requires_grad_(False)
    assert remember([model]) == []
    restore([model])
    assert_same(before, snapshot(model))
    model.requires_grad_(False)
    restore([model])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_forget_drops_what_was_remembered() -> None:
    model = network()
    forget(remember([model]))
    model.requires_grad_(False)
    restore([model])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_mark_adapted_sets_diffusers_flag_where_there_is_one() -> None:
    pipe = tiny_sd_pipeline()
    model = network()
    for module in (pipe.unet, pipe.text_encoder, model):
        mark_adapted(module)
    assert pipe.unet._hf_peft_config_loaded is True
    assert pipe.text_encoder._hf_peft_config_loaded is True
    assert not hasattr(model, "_hf_peft_config_loaded")


def test_a_pipelines_modules_can_be_garbage_collected() -> None:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config())
    unet = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert unet() is None
