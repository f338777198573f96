"""What PEFT's configs of LoRA, LoKr and LoHa say beside the scales: followed, without meaning, or refused by name."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffusekrona import load_krona, merge_file
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.peft_configs import _HARMLESS as harmless
from diffusekrona.files.formats.scales import HEADER
from diffusekrona.files.formats.updates import Update
from tests.modules import network
from tests.pipelines import tiny_sd_pipeline
from tests.snapshots import unchanged

CONFIGS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "LOKR": LoKrConfig, "LOHA": LoHaConfig}
REFUSED = {
    "LORA": {
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    },
    "LOKR": set(),
    "LOHA": set(),
}
"""Fields with which a layer computes something else than its factors tell."""

ONE = torch.ones(2, 2)
FILES: dict[str, dict[str, Tensor]] = {
    "LORA": {"x.lora_A.weight": ONE, "x.lora_B.weight": ONE},
    "LOKR": {"x.lokr_w1": ONE, "x.lokr_w2": ONE},
    "LOHA": {f"x.hada_{part}": ONE for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
}
methods = pytest.mark.parametrize("method", FILES)


def read(method: str, **config: Any) -> Update:
    header = {HEADER: json.dumps({"peft_type": method, **config})}
    return foreign.parse(FILES[method], header, "dog.safetensors")["x"]


@methods
def test_every_field_that_this_peft_has_is_sorted(method: str) -> None:
    """A field of a newer PEFT: find out whether it changes a layer's update, and sort it in."""
    fields = {field.name for field in dataclasses.fields(CONFIGS[method])}
    assert fields - harmless[method] - REFUSED[method] == set()
    assert harmless[method] & REFUSED[method] == set()


@pytest.mark.parametrize(
    ("method", "field"),
    [(method, name) for method, names in REFUSED.items() for name in sorted(names)]
    + [(method, "of_a_newer_peft") for method in REFUSED],
)
def test_what_changes_the_update_is_refused_by_name(method: str, field: str) -> None:
    with pytest.raises(
        AdapterFileError, match=rf"^dog\.safetensors: the layer x has a config with {field}=\{{'a': 1\}}, so"
    ):
        read(method, **{field: {"a": 1}})
    assert read(method, **{field: None}).delta().shape == read(method).delta().shape


@methods
def test_the_config_that_peft_saves_by_default_is_read(method: str) -> None:
    config = CONFIGS[method](r=2, target_modules=["x"])
    fields = json.loads(json.dumps(config.to_dict(), default=sorted))
    scale = (fields.get("lora_alpha") or fields.get("alpha")) / 2
    torch.testing.assert_close(read(method, **fields).delta(), read(method).delta() * scale)


@methods
def test_a_config_of_another_method_is_refused(method: str) -> None:
    for other in {kind.value for kind in PeftType} - {method}:
        with pytest.raises(
            AdapterFileError, match=f"the layer x has a config of PEFT's {other}, whose tensors only PEFT"
        ):
            read(method, peft_type=other)


# Where the start of training changed the base


@pytest.mark.parametrize("start", [True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica", None])
def test_a_start_that_leaves_the_base_alone_says_nothing(start: object) -> None:
    assert torch.equal(read("LORA", init_lora_weights=start).delta(), read("LORA").delta())


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "pissa_niter_4", "of a newer PEFT"])
def test_a_start_that_changed_the_base_in_an_unknown_way_is_refused_by_name(start: str) -> None:
    with pytest.raises(AdapterFileError, match=f"the layer x was trained with init_lora_weights='{start}', which cha"):
        read("LORA", init_lora_weights=start)


STARTS = pytest.mark.parametrize("start", ["pissa", "olora"])
SETTINGS = pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"to_out.0": 2}}], ids=str)


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def config(start: str, **settings: Any) -> LoraConfig:
    targets = ["to_q", "to_k", "to_out.0"]
    return LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=start, **settings)


@STARTS
@SETTINGS
def test_a_folder_merges_to_what_peft_loads(start: str, settings: dict[str, Any], tmp_path: Path) -> None:
    trained(get_peft_model(network(), config(start, **settings))).save_pretrained(tmp_path)
    expected = PeftModel.from_pretrained(network(), tmp_path).merge_and_unload()
    model = network()
    with unchanged(model), pytest.raises(AdapterFileError, match="from PiSSA or OLoRA, which count from other weights"):
        load_krona(model, tmp_path)
    assert merge_file(model, tmp_path) == 6
    assert not torch.equal(model.blocks[0].to_q.weight, network().blocks[0].to_q.weight)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


@STARTS
def test_a_file_of_diffusers_merges_to_what_was_trained(start: str, tmp_path: Path) -> None:
    pipe, chosen = tiny_sd_pipeline(), config(start)
    unet = trained(inject_adapter_in_model(chosen, pipe.unet))
    expected = {
        name: (layer.base_layer.weight + layer.get_delta_weight("default")).detach().clone()
        for name, layer in unet.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=json.loads(json.dumps(chosen.to_dict(), default=sorted)),
    )
    fresh = tiny_sd_pipeline()
    assert merge_file(fresh, tmp_path) == len(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(fresh.unet.get_submodule(name).weight.detach(), weight, rtol=1e-5, atol=1e-6)


@STARTS
def test_what_peft_converted_to_a_plain_lora_is_one(start: str, tmp_path: Path) -> None:
    model = get_peft_model(network(), config(start))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "before")
    model.peft_config["default"].init_lora_weights = start
    expected = copy.deepcopy(trained(model)).merge_and_unload()
    model.save_pretrained(tmp_path / "after", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    found = network()
    merge_file(found, tmp_path / "after")
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


@STARTS
@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_B.bias"])
def test_more_than_two_factors_from_there_are_refused(start: str, part: str) -> None:
    name = {"lora_magnitude_vector": "magnitude", "lora_B.bias": "up_bias"}[part]
    header = {HEADER: json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": start})}
    with pytest.raises(AdapterFileError, match=f"the layer x was trained from PiSSA or OLoRA and holds {name} beside"):
        foreign.parse({**FILES["LORA"], f"x.{part}": torch.ones(2)}, header)


# Biases of LoRA


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 5}}], ids=str)
def test_the_biases_of_lora_b_go_into_the_layers(settings: dict[str, Any], tmp_path: Path) -> None:
    chosen = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0"], lora_bias=True, **settings)
    model = trained(get_peft_model(network(), chosen))
    model.save_pretrained(tmp_path)
    expected, found = model.merge_and_unload(), network()
    assert merge_file(found, tmp_path) == 4
    assert not torch.equal(found.blocks[0].to_q.bias, network().blocks[0].to_q.bias)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
