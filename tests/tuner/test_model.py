"""KronA through PEFT's own functions, none of them patched."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn

from diffusekrona import KronAConfig, KronALayer
from diffusekrona.errors import AdapterNameError, FactorShapeError, MergeError
from diffusekrona.tuner.injected import krona_layers
from tests.modules import Network, inputs, network
from tests.snapshots import assert_same, bits, snapshot, unchanged

PROJECTIONS = [f"blocks.{i}.{name}" for i in range(2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
Injector = Callable[[nn.Module], None]


def config(**fields: Any) -> KronAConfig:
    """Factors of 2 × 8 that start random, so that an adapter changes the output at once."""
    return KronAConfig(**{"a1": 2, "a2": 8, "init_weights": False, **fields})


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)


def adapted(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(network(), config(**fields))


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs())


def layer_names(model: nn.Module) -> list[str]:
    return [name.removeprefix("base_model.model.") for name in krona_layers(model)]


def dense_reference(model: nn.Module) -> Network:
    """The base network with every active update added to its weights in float64."""
    reference = network().double()
    for name, layer in krona_layers(model).items():
        base = reference.get_submodule(name.removeprefix("base_model.model."))
        for adapter in layer.active_adapters:
            if adapter in layer.krona_A:
                A, B = layer.krona_A[adapter].double(), layer.krona_B[adapter].double()
                base.weight.data += layer.scaling[adapter] * torch.kron(A, B)
    return reference


def assert_computes_kronecker_updates(model: nn.Module) -> None:
    with torch.no_grad():
        expected = dense_reference(model)(*inputs(torch.float64))
    torch.testing.assert_close(output(model).double(), expected, rtol=1e-4, atol=1e-5)
    assert (expected - output(network())).abs().max() > 0.01


# Making an adapter


def test_get_peft_model_adapts_the_attention_projections_by_default() -> None:
    assert layer_names(adapted()) == PROJECTIONS


def test_get_peft_model_computes_the_base_plus_the_kronecker_products() -> None:
    assert_computes_kronecker_updates(adapted(alpha=0.5, alpha_pattern={"to_k": -2.0}))


def test_a_fresh_adapter_changes_nothing() -> None:
    assert torch.equal(output(get_peft_model(network(), KronAConfig(a1=2, a2=8))), output(network()))


def test_only_the_factors_are_trainable() -> None:
    model = adapted()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.{name}.krona_{factor}.default" for name in PROJECTIONS for factor in "AB"}


def test_print_trainable_parameters_counts_the_factors(capsys: pytest.CaptureFixture[str]) -> None:
    adapted().print_trainable_parameters()
    # Per block: Q and O have 2·8 + 12·3, K and V 2·8 + 12·2.
    assert "trainable params: 368 " in capsys.readouterr().out


def test_training_changes_the_factors_and_nothing_else() -> None:
    model = get_peft_model(network(), KronAConfig(a1=2, a2=8)).train()
    before = bits(model.get_base_model())
    target = torch.zeros_like(output(model))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = (model(*inputs()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert bits(model.get_base_model()) == before


def test_layer_status_and_model_status_describe_the_adapter() -> None:
    model = adapted()
    assert {tuple(status.available_adapters) for status in get_layer_status(model)} == {("default",)}
    status = get_model_status(model)
    assert status.num_adapter_layers == len(PROJECTIONS)
    assert status.trainable_params == 368


def test_factors_are_fp32_on_a_bf16_base() -> None:
    model = get_peft_model(network().bfloat16(), config())
    layers = krona_layers(model).values()
    assert {f.dtype for layer in layers for f in (layer.krona_A["default"], layer.krona_B["default"])} == {
        torch.float32
    }
    assert model(*inputs(torch.bfloat16)).dtype == torch.bfloat16


def test_an_adapter_that_is_added_to_a_model_in_evaluation_mode_has_no_dropout() -> None:
    model = network()
    inject_adapter_in_model(config(dropout=0.5), model)
    assert torch.equal(output(model), output(model))
    model.train()
    assert not torch.equal(output(model), output(model))


def test_a_deep_copy_is_independent() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), output(model))
    for layer in krona_layers(twin).values():
        nn.init.zeros_(layer.krona_B["default"])
    assert not torch.equal(output(twin), output(model))


# Choosing layers


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["to_q"]}, ["blocks.0.to_q", "blocks.1.to_q"]),
        ({"target_modules": ["blocks.1.to_v"]}, ["blocks.1.to_v"]),
        ({"target_modules": r"blocks\.0\.to_(q|k)"}, ["blocks.0.to_q", "blocks.0.to_k"]),
        ({"exclude_modules": ["to_out.0", "to_k", "to_v"]}, ["blocks.0.to_q", "blocks.1.to_q"]),
        ({"exclude_modules": r"blocks\.0\..*|.*to_out.*"}, [f"blocks.1.to_{x}" for x in "qkv"]),
        (
            {"target_modules": ["to_q"], "layers_to_transform": 1, "layers_pattern": ["layers", "blocks"]},
            ["blocks.1.to_q"],
        ),
        (
            {"target_modules": ["to_q"], "layers_to_transform": [0], "layers_pattern": "blocks"},
            ["blocks.0.to_q"],
        ),
        ({"target_modules": "all-linear"}, ["proj_in", *PROJECTIONS, "proj_out"]),
    ],
)
def test_the_config_chooses_the_layers(fields: dict[str, Any], expected: list[str]) -> None:
    assert layer_names(adapted(**fields)) == expected


def test_factor_pattern_gives_layers_their_own_factors_and_the_first_match_counts() -> None:
    model = adapted(factor_pattern={r"blocks\.0\.to_k": (3, 4), "to_k": (6, 2), r".*to_out\..*": (1, 1)})
    shapes = {
        name.removeprefix("base_model.model."): tuple(layer.krona_A["default"].shape)
        for name, layer in krona_layers(model).items()
    }
    assert shapes == dict.fromkeys(PROJECTIONS, (2, 8)) | {
        "blocks.0.to_k": (3, 4),
        "blocks.1.to_k": (6, 2),
        "blocks.0.to_out.0": (1, 1),
        "blocks.1.to_out.0": (1, 1),
    }
    assert_computes_kronecker_updates(model)


def test_factor_pattern_that_matches_no_layer_warns() -> None:
    with pytest.warns(RuntimeWarning, match="'to_x', which matches no targeted layer"):
        adapted(factor_pattern={"to_x": (2, 4)})


def test_a_model_without_a_targeted_layer_is_an_error() -> None:
    model = network()
    with unchanged(model), pytest.raises(ValueError, match="to_x"):
        get_peft_model(model, config(target_modules=["to_x"]))


# Errors, all or nothing


def test_factors_that_do_not_divide_name_the_layer_its_size_and_the_nearest_factors() -> None:
    with pytest.raises(FactorShapeError) as raised:
        get_peft_model(network(), config(a1=5, a2=7))
    text = str(raised.value)
    assert "8 targeted layer(s)" in text
    assert "blocks.0.to_q: a1=5 does not divide its 24 output features (nearest divisors: 4 and 6)" in text
    assert "a2=7 does not divide its 24 input features (nearest divisors: 6 and 8)" in text
    assert "the nearest factors that fit are (6, 8)" in text
    assert "and 5 more" in text
    assert "factor_pattern={" in text


def test_factor_pattern_is_the_way_out_for_a_layer_that_does_not_fit() -> None:
    with pytest.raises(FactorShapeError, match=r"4 targeted layer.*\n.*blocks\.0\.to_k"):
        adapted(a2=3)
    model = adapted(a2=3, factor_pattern={"to_k|to_v": (2, 4)})
    assert layer_names(model) == PROJECTIONS
    assert_computes_kronecker_updates(model)


def test_a_layer_that_is_not_linear_is_an_error_that_names_it() -> None:
    with pytest.raises(FactorShapeError, match="norm: it is a LayerNorm, and KronA adapts linear layers"):
        adapted(target_modules=["to_q", "norm"])


class Uncopyable(nn.Linear):
    """Fails late in an injection, when PEFT has already wrapped every targeted layer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Uncopyable":
        raise RuntimeError("this layer cannot be copied")


def nothing(model: nn.Module) -> None:
    pass


def with_krona(model: nn.Module) -> None:
    inject_adapter_in_model(config(modules_to_save=["proj_in"]), model, "first")


def with_frozen_krona(model: nn.Module) -> None:
    inject_adapter_in_model(config(inference_mode=True), model, "first")


def with_lora(model: nn.Module) -> None:
    inject_adapter_in_model(lora(), model, "first")


def with_both(model: nn.Module) -> None:
    with_lora(model)
    inject_adapter_in_model(config(), model, "second")


@pytest.mark.parametrize("before", [nothing, with_krona, with_frozen_krona, with_lora, with_both])
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"a1": 5}, FactorShapeError),
        ({"target_modules": ["to_q", "norm"]}, FactorShapeError),
        ({"target_modules": ["to_x"]}, ValueError),
        ({"modules_to_save": ["proj_out"]}, RuntimeError),
    ],
)
def test_a_failed_injection_leaves_the_model_as_it_was(
    before: Injector, bad: dict[str, Any], error: type[Exception]
) -> None:
    model = network()
    model.proj_out = Uncopyable(24, 4)
    before(model)
    with unchanged(model), pytest.raises(error):
        inject_adapter_in_model(config(**bad), model, "bad")


def test_a_failed_add_adapter_leaves_the_peft_model_as_it_was() -> None:
    model = adapted()
    with unchanged(model), pytest.raises(FactorShapeError):
        model.add_adapter("bad", config(a1=5))


def test_a_name_that_is_taken_is_an_error_and_keeps_the_adapter_of_that_name() -> None:
    model = network()
    inject_adapter_in_model(config(), model, "mine")
    with unchanged(model), pytest.raises(AdapterNameError, match="already has an adapter named 'mine'"):
        inject_adapter_in_model(config(a1=3), model, "mine")


# Saving and loading


def test_save_pretrained_and_from_pretrained_round_trip(tmp_path: Path) -> None:
    model = adapted(factor_pattern={"to_k": (3, 4)}, alpha=0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network(), tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert isinstance(loaded.peft_config["default"], KronAConfig)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "KRONA"


def test_from_pretrained_with_low_cpu_mem_usage(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(output(loaded), output(model))


def test_from_pretrained_to_train_on(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network(), tmp_path, is_trainable=True)
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * len(PROJECTIONS)


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["proj_out"])
    copied = model.get_base_model().proj_out.modules_to_save["default"]
    assert copied.weight.requires_grad
    nn.init.ones_(copied.weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network(), tmp_path)
    assert torch.equal(output(loaded), output(model))
    with loaded.disable_adapter():
        assert torch.equal(output(loaded), output(network()))


# Several adapters


def test_load_set_and_delete_adapter(tmp_path: Path) -> None:
    other = get_peft_model(network(), config(a1=3, target_modules=["to_q"]))
    other.save_pretrained(tmp_path)
    model = adapted()
    first = output(model)
    model.load_adapter(tmp_path, "other")
    assert torch.equal(output(model), first)
    model.set_adapter("other")
    assert torch.equal(output(model), output(other))
    model.set_adapter("default")
    assert torch.equal(output(model), first)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert all(list(layer.krona_A) == ["default"] for layer in krona_layers(model).values())
    assert torch.equal(output(model), first)


def test_several_active_adapters_add_up() -> None:
    model = adapted()
    model.add_adapter("other", config(a1=3, target_modules=["to_q", "to_out.0"]))
    model.base_model.set_adapter(["default", "other"])
    assert_computes_kronecker_updates(model)


def test_disable_adapter_gives_the_base_model_and_then_the_adapter_again() -> None:
    model = adapted()
    with model.disable_adapter():
        assert torch.equal(output(model), output(network()))
    assert not torch.equal(output(model), output(network()))


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_adapter_and_unmerge_adapter_restore_the_weights_bit_for_bit(dtype: torch.dtype) -> None:
    model = get_peft_model(network().to(dtype), config())
    model.add_adapter("other", config(a1=3, alpha=30))
    before = bits(model.get_base_model())
    for names in (None, ["other"], ["default", "other"], ["other"]):
        model.merge_adapter(names)
        model.unmerge_adapter()
        assert bits(model.get_base_model()) == before


def test_a_merged_model_computes_the_same() -> None:
    model = adapted()
    unmerged = output(model)
    model.merge_adapter()
    torch.testing.assert_close(output(model), unmerged, rtol=1e-5, atol=1e-5)


def test_merge_and_unload_gives_a_plain_network_that_computes_the_same() -> None:
    model = adapted()
    unmerged = output(model)
    plain = model.merge_and_unload()
    assert type(plain) is Network
    assert [type(module) for module in plain.modules()] == [type(module) for module in network().modules()]
    torch.testing.assert_close(output(plain), unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged", [[], ["default"], ["default", "other"]])
def test_merge_and_unload_leaves_the_bits_of_a_merge_also_where_some_are_merged_already(merged: list[str]) -> None:
    names = ["default", "other"]
    models = [adapted() for _ in range(2)]
    for model in models:
        model.base_model.to(torch.bfloat16)
        torch.manual_seed(1)
        model.add_adapter("other", config(a1=3, alpha=30))
    models[0].merge_adapter(names)
    for name in merged:
        models[1].merge_adapter([name])
    expected = [layer.get_base_layer().weight for layer in krona_layers(models[0]).values()]
    found = dict(models[1].merge_and_unload(adapter_names=names).named_parameters())
    weights = [found[f"{name.removeprefix('base_model.model.')}.weight"] for name in krona_layers(models[0])]
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(expected, weights, strict=True))


def test_merge_and_unload_of_one_bad_factor_changes_nothing() -> None:
    model = adapted()
    list(krona_layers(model).values())[-1].krona_A["default"].data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(MergeError, match="Nothing was merged"):
        model.merge_and_unload()
    assert_same(before, snapshot(model))


def test_unload_gives_back_the_base_model() -> None:
    base = network()
    before = snapshot(base.requires_grad_(False))
    assert_same(before, snapshot(get_peft_model(base, config()).unload()))


def test_convert_to_lora_keeps_an_update_whose_rank_it_can_hold() -> None:
    # The rank of A ⊗ B is at most min(2, 8)·min(12, 3), or with 12 × 2 factors of K and V less.
    model = adapted()
    converted, tensors = convert_to_lora(model, rank=6)
    name = "base_model.model.blocks.0.to_q"
    product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    expected = krona_layers(model)[name].get_delta_weight("default")
    torch.testing.assert_close(product * converted.lora_alpha / converted.r, expected, rtol=1e-4, atol=1e-4)


# Beside LoRA


@pytest.mark.parametrize("order", [("krona", "lora"), ("lora", "krona")])
def test_krona_and_lora_add_up_on_the_same_layers_in_either_order(order: tuple[str, str]) -> None:
    model = network()
    for name in order:
        torch.manual_seed(0)
        inject_adapter_in_model(config() if name == "krona" else lora(), model, name)
    alone = {}
    for name, injected in (("krona", config()), ("lora", lora())):
        torch.manual_seed(0)
        alone[name] = inject_adapter_in_model(injected, network(), name)
    x = inputs()[0]
    layer = "blocks.0.to_q"
    both, krona, low_rank, base = (m.get_submodule(layer)(x) for m in (model, alone["krona"], alone["lora"], network()))
    torch.testing.assert_close(both, krona + low_rank - base, rtol=1e-5, atol=1e-5)
    assert not torch.equal(krona, base)
    assert not torch.equal(low_rank, base)


def test_a_second_adapter_joins_the_first_under_a_lora() -> None:
    model = network()
    for name, injected in (("one", config()), ("lora", lora()), ("two", config(a1=3))):
        inject_adapter_in_model(injected, model, name)
    assert all(list(layer.krona_A) == ["one", "two"] for layer in krona_layers(model).values())
    assert not any(
        isinstance(inner, KronALayer) for layer in krona_layers(model).values() for inner in list(layer.modules())[1:]
    )


# Registration

UNPATCHED = """
import json, types
import peft, peft.mapping, diffusers, transformers
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from transformers.integrations.peft import PeftAdapterMixin as TextAdapterMixin
import peft.utils.save_and_load, peft.utils.other, peft.peft_model, diffusers.utils.peft_utils

watched = [
    peft, peft.mapping, peft.peft_model, peft.peft_model.PeftModel, BaseTuner, BaseTunerLayer,
    peft.utils.save_and_load, peft.utils.other, diffusers.utils.peft_utils, PeftAdapterMixin, LoraBaseMixin,
    TextAdapterMixin, diffusers.DiffusionPipeline, diffusers.UNet2DConditionModel,
]
values = [dict(vars(one)) for one in watched]
tables = [dict(t) for t in vars(peft.mapping).values() if isinstance(t, dict)]
import diffusekrona
changed = [
    f"{one.__name__}.{name}" for one, old in zip(watched, values)
    for name, value in vars(one).items()
    if not isinstance(value, types.ModuleType) and old.get(name) is not value and not name.startswith("_abc")
]
now = [t for t in vars(peft.mapping).values() if isinstance(t, dict)]
added = [sorted(str(k.value) for k in t.keys() - old.keys()) for t, old in zip(now, tables) if t != old]
print(json.dumps({"changed": changed, "added": added}))
"""


def test_importing_adds_entries_to_pefts_tables_and_replaces_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", UNPATCHED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"changed": [], "added": [["KRONA"]] * 3}
