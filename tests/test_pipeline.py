"""The helpers on whole pipelines and single modules: inject, save, load, merge, unmerge and unload."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffusekrona import (
    KronAConfig,
    inject_krona,
    load_krona,
    merge_krona,
    save_krona,
    unload_krona,
    unmerge_krona,
)
from diffusekrona.errors import (
    AdapterFileError,
    AdapterNameError,
    ConfigError,
    FactorShapeError,
    KronAError,
    MergeError,
)
from diffusekrona.tuner.injected import krona_layers
from tests.modules import Network, inputs, network
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.snapshots import assert_same, bits, snapshot, unchanged

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
FORMS = pytest.mark.parametrize("form", ["my-dog", "my-dog.safetensors"])


def config(**fields: Any) -> KronAConfig:
    """Small factors that start random, so that an adapter changes the output at once."""
    return KronAConfig(**{"a1": 4, "a2": 8, "init_weights": False, **fields})


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=1, target_modules=["to_q", "to_k"], init_lora_weights=False)


def render(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, generator=generator, output_type="np").images


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs(next(model.parameters()).dtype))


def trainable(pipe: Any) -> set[int]:
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return {id(p) for module in modules for p in module.parameters() if p.requires_grad}


def factors(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    layers = {name.replace(".base_layer", ""): layer for name, layer in krona_layers(model).items()}
    return {
        f"{name}.{factor}": getattr(layer, f"krona_{factor}")[adapter]
        for name, layer in layers.items()
        for factor in "AB"
    }


def assert_same_factors(model: nn.Module, other: nn.Module, adapter: str = "default") -> None:
    mine, theirs = factors(model, adapter), factors(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def train(adapter: Any, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(*inputs()).square().mean().backward()
        optimizer.step()


# Injecting


def test_inject_krona_adapts_the_denoiser_only() -> None:
    pipe = tiny_sdxl_pipeline()
    adapter = inject_krona(pipe)
    assert list(adapter.components) == ["unet"]
    assert len(krona_layers(pipe.unet)) == 88
    assert {tuple(layer.krona_A["default"].shape) for layer in krona_layers(pipe.unet).values()} == {(4, 64)}
    assert not krona_layers(pipe.text_encoder)
    assert not krona_layers(pipe.text_encoder_2)


def test_inject_krona_adapts_the_text_encoders_when_asked() -> None:
    pipe = tiny_sdxl_pipeline()
    adapter = inject_krona(pipe, text_encoders=True)
    assert list(adapter.components) == ["unet", "text_encoder", "text_encoder_2"]
    assert len(krona_layers(pipe.text_encoder)) == len(krona_layers(pipe.text_encoder_2)) == 8
    assert "unet, text_encoder, text_encoder_2" in repr(adapter)


def test_inject_krona_leaves_the_denoiser_out_when_asked() -> None:
    pipe = tiny_sdxl_pipeline()
    adapter = inject_krona(pipe, text_encoders=["text_encoder_2"], denoiser=False)
    assert list(adapter.components) == ["text_encoder_2"]
    assert trainable(pipe) == {id(parameter) for parameter in adapter.parameters()}
    with unchanged(pipe), pytest.raises(ConfigError, match="Without the denoiser there is nothing to adapt"):
        inject_krona(pipe, denoiser=False, adapter_name="other")


def test_inject_krona_leaves_just_the_factors_trainable() -> None:
    pipe = tiny_sdxl_pipeline()
    adapter = inject_krona(pipe, text_encoders=True)
    named = dict(adapter.named_parameters())
    assert trainable(pipe) == {id(parameter) for parameter in named.values()}
    assert len(named) == 2 * (88 + 8 + 8)
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.krona_A" in named
    assert list(adapter.parameters()) == list(named.values())


def test_a_second_adapter_leaves_the_first_one_trainable() -> None:
    pipe = tiny_sd_pipeline()
    one, two = inject_krona(pipe, config(), "one"), inject_krona(pipe, config(), "two")
    assert trainable(pipe) == {id(parameter) for parameter in (*one.parameters(), *two.parameters())}


def test_modules_to_save_belong_to_the_adapters_parameters() -> None:
    model = network()
    adapter = inject_krona(model, config(modules_to_save=["proj_out"]))
    names = {name for name, _ in adapter.named_parameters()}
    assert {name for name in names if "krona" not in name} == {"proj_out.weight", "proj_out.bias"}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}


@pytest.mark.parametrize("name", ["weight", "0", "attentions", "a", "unet", "my dog"])
def test_any_sensible_adapter_name_works(tmp_path: Path, name: str) -> None:
    pipe, loaded = tiny_sd_pipeline(), tiny_sd_pipeline()
    adapter = inject_krona(pipe, config(), name)
    assert trainable(pipe) == {id(parameter) for parameter in adapter.parameters()}
    assert len(trainable(pipe)) == 2 * 56
    inject_krona(pipe, config(), "other")
    for saved in (name, "other"):
        save_krona(pipe, tmp_path / saved, saved)
    load_krona(loaded, tmp_path / name, "third")
    load_krona(loaded, tmp_path / "other", name)
    for saved, adapter_name in ((name, "third"), ("other", name)):
        for key, factor in factors(pipe.unet, saved).items():
            assert torch.equal(factor, factors(loaded.unet, adapter_name)[key])


@pytest.mark.parametrize("name", ["", "my.dog", "train", "values"])
def test_a_name_that_cannot_be_a_key_of_a_module_is_an_error(name: str) -> None:
    pipe = tiny_sd_pipeline()
    with unchanged(pipe), pytest.raises(AdapterNameError, match="cannot be named"):
        inject_krona(pipe, config(), name)


@pytest.mark.parametrize("text_encoders", [False, True])
def test_a_name_that_any_method_has_taken_is_an_error(text_encoders: bool) -> None:
    pipe = tiny_sd_pipeline()
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"]), "mine")
    with unchanged(pipe), pytest.raises(AdapterNameError, match="already has an adapter named 'mine'"):
        inject_krona(pipe, config(), "mine", text_encoders=text_encoders)


@pytest.mark.parametrize("thing", [None, {"unet": network()}, SimpleNamespace(components={"vae": network()})])
def test_what_is_neither_a_module_nor_a_pipeline_is_an_error(thing: Any) -> None:
    with pytest.raises(KronAError, match="a torch module or a Diffusers pipeline"):
        inject_krona(thing)


def nothing(pipe: Any) -> None:
    pass


def one_adapter(pipe: Any) -> None:
    inject_krona(pipe, config(), "first")


def one_lora(pipe: Any) -> None:
    pipe.unet.add_adapter(lora(), "first")


def frozen_and_lora(pipe: Any) -> None:
    inject_krona(pipe, config(inference_mode=True), "first", text_encoders=True)
    pipe.unet.add_adapter(lora(), "second")
    pipe.set_adapters(["second", "first"], [0.5, 2.0])


def merged(pipe: Any) -> None:
    inject_krona(pipe, config(), "first", text_encoders=True)
    merge_krona(pipe)
    for layer in krona_layers(pipe.unet).values():
        nn.init.normal_(layer.krona_A["first"])


BEFORE = pytest.mark.parametrize("before", [nothing, one_adapter, one_lora, frozen_and_lora, merged])


@BEFORE
@pytest.mark.parametrize("bad", [{"a1": 3}, {"factor_pattern": {"q_proj": (4, 5)}}, {"target_modules": ["to_q"]}])
def test_an_injection_that_fails_in_any_component_leaves_the_pipeline_as_it_was(
    before: Callable[[Any], None], bad: dict[str, Any]
) -> None:
    pipe = tiny_sd_pipeline()
    before(pipe)
    with unchanged(pipe), pytest.raises(ValueError, match=r"to_q|q_proj"):
        inject_krona(pipe, config(**bad), "bad", text_encoders=True)


class Interrupting(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Interrupting":
        raise KeyboardInterrupt


@BEFORE
def test_an_interrupted_injection_leaves_the_pipeline_as_it_was(before: Callable[[Any], None]) -> None:
    pipe = tiny_sd_pipeline()
    pipe.text_encoder.late = Interrupting(4, 4)
    before(pipe)
    with unchanged(pipe), pytest.raises(KeyboardInterrupt):
        inject_krona(pipe, config(modules_to_save=["late"]), "bad", text_encoders=True)


def test_an_adapter_that_is_added_to_a_merged_pipeline_is_alone_active() -> None:
    pipe, alone = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(pipe, config(), "one")
    merge_krona(pipe)
    for each in (pipe, alone):
        torch.manual_seed(0)
        inject_krona(each, config(), "two")
    assert {tuple(layer.merged_adapters) for layer in krona_layers(pipe.unet).values()} == {()}
    assert np.array_equal(render(pipe), render(alone))


def test_a_pattern_may_be_meant_for_another_component() -> None:
    inject_krona(tiny_sd_pipeline(), config(factor_pattern={"to_k": (8, 2)}), text_encoders=True)
    with pytest.warns(RuntimeWarning, match="'to_x', which matches no targeted layer"):
        inject_krona(tiny_sd_pipeline(), config(factor_pattern={"to_x": (8, 2)}))


def test_the_error_names_the_layer_its_size_and_the_nearest_factors_that_fit() -> None:
    with pytest.raises(FactorShapeError) as raised:
        inject_krona(tiny_sd_pipeline(), KronAConfig(a1=3, a2=100))
    assert "attn1.to_q: a1=3 does not divide its 64 output features" in str(raised.value)
    assert "a2=100 does not divide its 64 input features" in str(raised.value)
    assert "the nearest factors that fit are (4, 64)" in str(raised.value)
    inject_krona(tiny_sd_pipeline(), KronAConfig(a1=3, a2=100, factor_pattern={r"to_.*": (4, 64)}))


# Unloading

Change = Callable[[Any, Path], None]


def inject(pipe: Any, folder: Path) -> None:
    inject_krona(pipe, config())


def inject_everywhere_with_copies(pipe: Any, folder: Path) -> None:
    inject_krona(pipe, config(modules_to_save=["conv_out", "final_layer_norm"]), text_encoders=True)


def inject_two(pipe: Any, folder: Path) -> None:
    inject_krona(pipe, config(modules_to_save=["conv_out"]), "one")
    inject_krona(pipe, config(a1=8, target_modules=["to_q", "ff.net.2"]), "two")


def inject_and_train(pipe: Any, folder: Path) -> None:
    adapter = inject_krona(pipe, config(modules_to_save=["conv_out"]))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    predicted = pipe.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 64)).sample
    predicted.square().mean().backward()
    optimizer.step()


def merge_two(pipe: Any, folder: Path) -> None:
    inject_two(pipe, folder)
    pipe.set_adapters(["one", "two"], [0.5, 2.0])
    merge_krona(pipe)


def load(pipe: Any, folder: Path) -> None:
    other = tiny_sd_pipeline()
    inject_krona(other, config(), text_encoders=True)
    save_krona(other, folder)
    load_krona(pipe, folder)


def use_diffusers(pipe: Any, folder: Path) -> None:
    pipe.unet.add_adapter(config(), "mine")
    pipe.text_encoder.add_adapter(config(), "mine")
    pipe.disable_lora()


def delete_merged(pipe: Any, folder: Path) -> None:
    inject_two(pipe, folder)
    merge_krona(pipe, ["one", "two"])
    pipe.delete_adapters("one")


CHANGES = [
    inject, inject_everywhere_with_copies, inject_two, inject_and_train, merge_two, load, use_diffusers,
    delete_merged,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("frozen", [False, True])
def test_unload_krona_leaves_the_pipeline_as_if_it_had_never_been_there(
    tmp_path: Path, change: Change, frozen: bool
) -> None:
    pipe = tiny_sd_pipeline()
    pipe.vae.requires_grad_(False)
    pipe.unet.requires_grad_(not frozen)
    pipe.unet.conv_in.requires_grad_(frozen)
    pictures = render(pipe)
    before = snapshot(pipe)
    change(pipe, tmp_path)
    if change is use_diffusers:
        # Diffusers' own function freezes the base, and only ours remembers what it was.
        thaw(pipe, before)
    unload_krona(pipe)
    assert_same(before, snapshot(pipe))
    assert np.array_equal(render(pipe), pictures)


def thaw(pipe: Any, before: dict[str, Any]) -> None:
    flags = {value[0]: value[1] for key, value in before.items() if key.endswith(" parameter")}
    for part in ("unet", "text_encoder"):
        for parameter in getattr(pipe, part).parameters():
            parameter.requires_grad_(flags.get(id(parameter), False))


def test_unload_krona_leaves_a_module_as_if_it_had_never_been_there() -> None:
    model = network()
    before = snapshot(model)
    train(inject_krona(model, config(a1=2)), model)
    merge_krona(model)
    unload_krona(model)
    assert_same(before, snapshot(model))


def test_unloading_one_of_two_adapters_makes_the_other_what_it_was() -> None:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config(inference_mode=True, modules_to_save=["conv_out"]), "one")
    pictures, before = render(pipe), snapshot(pipe)
    inject_krona(pipe, config(a1=8, modules_to_save=["conv_in"]), "two")
    merge_krona(pipe)
    unload_krona(pipe, "two")
    assert_same(before, snapshot(pipe))
    assert np.array_equal(render(pipe), pictures)


def test_unload_krona_unmerges_what_fuse_lora_merged() -> None:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config())
    pipe.fuse_lora()
    unload_krona(pipe)
    assert bits(pipe.unet) == bits(tiny_sd_pipeline().unet)


def test_unloading_one_of_two_merged_adapters_keeps_the_other_merged() -> None:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config(), "one")
    merge_krona(pipe)
    pictures = render(pipe)
    inject_krona(pipe, config(), "two")
    merge_krona(pipe, ["one", "two"])
    unload_krona(pipe, "two")
    assert {tuple(layer.merged_adapters) for layer in krona_layers(pipe.unet).values()} == {("one",)}
    assert np.array_equal(render(pipe), pictures)
    unload_krona(pipe)
    assert bits(pipe.unet) == bits(tiny_sd_pipeline().unet)


def test_unload_krona_of_a_component_keeps_the_others() -> None:
    pipe = tiny_sd_pipeline()
    before, before_unet = snapshot(pipe), snapshot(pipe.unet)
    inject_krona(pipe, config(), text_encoders=True)
    unload_krona(pipe.unet)
    assert_same(before_unet, snapshot(pipe.unet))
    assert krona_layers(pipe.text_encoder)
    unload_krona(pipe)
    assert_same(before, snapshot(pipe))


def test_unload_krona_without_an_adapter_does_nothing() -> None:
    pipe = tiny_sd_pipeline()
    with unchanged(pipe):
        unload_krona(pipe)


def test_unload_krona_does_not_know_other_names() -> None:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config())
    with unchanged(pipe), pytest.raises(AdapterNameError, match="No KronA adapter is named 'cat'"):
        unload_krona(pipe, "cat")


# Transformers


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def flux_output(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 16, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 6, 32, generator=generator),
            pooled_projections=torch.randn(1, 32, generator=generator),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(6, 3),
        ).sample


def sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
    ).eval()  # fmt: skip


def sd3_output(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 8, 8, generator=generator),
            encoder_hidden_states=torch.randn(1, 6, 32, generator=generator),
            pooled_projections=torch.randn(1, 32, generator=generator),
            timestep=torch.tensor([5]),
        ).sample


@pytest.mark.parametrize(("build", "run", "layers"), [(flux, flux_output, 11), (sd3, sd3_output, 15)])
@FORMS
def test_a_pipeline_with_a_transformer(
    tmp_path: Path, build: Callable[[], nn.Module], run: Callable[[nn.Module], Any], layers: int, form: str
) -> None:
    pipe, loaded = (SimpleNamespace(components={"transformer": build(), "vae": None}) for _ in range(2))
    model, other = pipe.components["transformer"], loaded.components["transformer"]
    before, base = snapshot(model), run(model)
    inject_krona(pipe, config())
    assert len(krona_layers(model)) == layers
    adapted = run(model)
    assert (adapted - base).abs().max() > 1e-3
    save_krona(pipe, tmp_path / form)
    load_krona(loaded, tmp_path / form)
    assert torch.equal(run(other), adapted)
    merge_krona(pipe)
    torch.testing.assert_close(run(model), adapted, rtol=1e-4, atol=1e-4)
    unload_krona(pipe)
    assert_same(before, snapshot(model))
    assert torch.equal(run(model), base)


def test_a_real_flux_pipeline_and_its_set_adapters() -> None:
    pipe = FluxPipeline(*[None] * 6, transformer=flux())
    inject_krona(pipe, config())
    pipe.set_adapters("default", 0.5)
    assert {layer.scaling["default"] for layer in krona_layers(pipe.transformer).values()} == {0.5}
    pipe.unload_lora_weights()
    assert torch.equal(flux_output(pipe.transformer), flux_output(flux()))


# Some of the text encoders


@FORMS
@pytest.mark.parametrize("names", [["text_encoder_2"], "text_encoder_2", {"text_encoder_2"}])
def test_some_of_the_text_encoders_are_adapted_and_saved(names: Any, tmp_path: Path, form: str) -> None:
    pipe, fresh = tiny_sdxl_pipeline(), tiny_sdxl_pipeline()
    krona = inject_krona(pipe, config(), text_encoders=names)
    assert list(krona.components) == ["unet", "text_encoder_2"]
    assert trainable(pipe) == {id(factor) for factor in krona.parameters()}
    assert not krona_layers(pipe.text_encoder)
    save_krona(pipe, tmp_path / form)
    assert list(load_krona(fresh, tmp_path / form).components) == ["unet", "text_encoder_2"]
    assert np.array_equal(render(fresh), render(pipe))


def test_no_text_encoder_is_adapted_by_an_empty_list() -> None:
    assert list(inject_krona(tiny_sdxl_pipeline(), config(), text_encoders=[]).components) == ["unet"]


@pytest.mark.parametrize(
    ("build", "names", "there"),
    [
        (
            tiny_sd_pipeline,
            ["text_encoder", "text_encoder_2"],
            "this model has, text_encoder; it names 'text_encoder_2'",
        ),
        (tiny_sdxl_pipeline, ["unet"], "text_encoder, text_encoder_2; it names 'unet'"),
        (network, ["text_encoder"], "which are none; it names 'text_encoder'"),
    ],
)
def test_a_text_encoder_that_is_not_there_is_refused_with_those_that_are(build: Any, names: Any, there: str) -> None:
    model = build()
    with unchanged(model), pytest.raises(ConfigError, match=there):
        inject_krona(model, config(), text_encoders=names)


# Merging


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 6e-2)])
def test_a_merged_pipeline_renders_the_same(dtype: torch.dtype, tolerance: float) -> None:
    pipe = tiny_sd_pipeline().to(dtype)
    base = render(pipe)
    inject_krona(pipe, config(), text_encoders=True)
    unmerged = render(pipe)
    merge_krona(pipe)
    np.testing.assert_allclose(render(pipe), unmerged, atol=tolerance)
    assert np.abs(unmerged - base).max() > tolerance
    unmerge_krona(pipe)
    assert np.array_equal(render(pipe), unmerged)


def test_several_adapters_are_merged_with_their_weights() -> None:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config(), "one")
    inject_krona(pipe, config(a1=8, alpha=0.5), "two")
    pipe.set_adapters(["one", "two"], [0.5, -2.0])
    unmerged = render(pipe)
    merge_krona(pipe)
    np.testing.assert_allclose(render(pipe), unmerged, atol=2e-4)
    assert {tuple(layer.merged_adapters) for layer in krona_layers(pipe.unet).values()} == {("one", "two")}


def test_the_merged_weight_is_the_base_plus_the_products() -> None:
    model, base = network(), network()
    inject_krona(model, config(alpha=-3.0, a1=2))
    merge_krona(model)
    for name, layer in krona_layers(model).items():
        update = -3 * torch.kron(layer.krona_A["default"].double(), layer.krona_B["default"].double())
        expected = base.get_submodule(name).weight.double() + update
        torch.testing.assert_close(layer.base_layer.weight.double(), expected, rtol=1e-6, atol=1e-6)


@DTYPES
def test_unmerging_restores_every_bit_after_any_order_of_merges(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    original = bits(model)
    names = ["one", "two", "three"]
    for index, name in enumerate(names):
        inject_krona(model, config(a1=2, alpha=10.0**-index, target_modules=r".*to_(q|k|v)"), name)
    chance = random.Random(0)
    merged: dict[tuple[str, ...], dict[str, str]] = {}
    for _ in range(60):
        some = chance.sample(names, chance.randint(1, 3))
        (merge_krona if chance.random() < 0.6 else unmerge_krona)(model, some)
        (now,) = {tuple(layer.merged_adapters) for layer in krona_layers(model).values()}
        assert merged.setdefault(now, bits(model)) == bits(model)
    unmerge_krona(model)
    assert bits(model) == original


def test_factors_that_change_while_merged_do_not_change_what_unmerging_gives_back() -> None:
    model = network()
    original = bits(model)
    inject_krona(model, config(a1=2))
    merge_krona(model)
    for factor in factors(model).values():
        nn.init.normal_(factor)
    unmerge_krona(model)
    assert bits(model) == original


def test_merging_twice_merges_once() -> None:
    model = network()
    inject_krona(model, config(a1=2))
    merge_krona(model)
    with unchanged(model):
        merge_krona(model)


def test_merging_names_only_what_is_asked_for() -> None:
    model = network()
    inject_krona(model, config(a1=2), "one")
    inject_krona(model, config(a1=2), "two")
    merge_krona(model, "one")
    assert {tuple(layer.merged_adapters) for layer in krona_layers(model).values()} == {("one",)}
    merge_krona(model, ["two"])
    unmerge_krona(model, "one")
    assert {tuple(layer.merged_adapters) for layer in krona_layers(model).values()} == {("two",)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_merge_that_is_not_finite_in_the_last_layer_changes_nothing_anywhere(
    value: float, merged_before: bool
) -> None:
    pipe = tiny_sd_pipeline().to(torch.float16)
    if merged_before:
        inject_krona(pipe, config(), "first", text_encoders=True)
        merge_krona(pipe)
    inject_krona(pipe, config(), "bad", text_encoders=True)
    name, layer = list(krona_layers(pipe.text_encoder).items())[-1]
    layer.krona_B["bad"].data[-1, -1] = value
    with unchanged(pipe), pytest.raises(MergeError, match=rf"text_encoder\.{name}: .*Nothing was merged"):
        merge_krona(pipe)


def test_merge_krona_does_not_know_other_names() -> None:
    pipe = tiny_sd_pipeline()
    pipe.unet.add_adapter(lora(), "lora")
    with unchanged(pipe), pytest.raises(AdapterNameError, match="There is no KronA adapter"):
        merge_krona(pipe)
    inject_krona(pipe, config(), "mine")
    for function, name in itertools.product((merge_krona, unmerge_krona), ("cat", "lora")):
        with unchanged(pipe), pytest.raises(AdapterNameError, match=f"No KronA adapter is named '{name}'"):
            function(pipe, ["mine", name])


def test_unmerging_what_was_cast_while_merged_is_an_error_and_changes_nothing() -> None:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config())
    merge_krona(pipe)
    pipe.to(torch.float16)
    for function in (unmerge_krona, unload_krona):
        with unchanged(pipe), pytest.raises(MergeError, match="Nothing was unmerged"):
            function(pipe)


@FORMS
def test_a_merged_adapter_is_saved_as_it_is_unmerged(tmp_path: Path, form: str) -> None:
    model = network()
    inject_krona(model, config(a1=2))
    save_krona(model, tmp_path / "unmerged" / form)
    merge_krona(model)
    save_krona(model, tmp_path / "merged" / form)
    assert contents(tmp_path / "merged") == contents(tmp_path / "unmerged")


def test_training_goes_on_after_unmerging() -> None:
    def trained(between: Callable[[nn.Module], None]) -> Network:
        torch.manual_seed(0)
        model = network()
        adapter = inject_krona(model, config(a1=2))
        train(adapter, model)
        between(model)
        train(adapter, model)
        return model

    def merge_and_unmerge(model: nn.Module) -> None:
        merge_krona(model)
        unmerge_krona(model)

    assert_same_factors(trained(merge_and_unmerge), trained(lambda model: None))


# Saving and loading


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@FORMS
@pytest.mark.parametrize("text_encoders", [False, True])
def test_a_saved_adapter_loads_into_a_fresh_pipeline(tmp_path: Path, form: str, text_encoders: bool) -> None:
    pipe, loaded = tiny_sdxl_pipeline(), tiny_sdxl_pipeline()
    pattern = {r"attn2\.to_(k|v)": (8, 16)}
    inject_krona(pipe, config(alpha=0.5, factor_pattern=pattern), "mine", text_encoders=text_encoders)
    assert save_krona(pipe, tmp_path / form) == tmp_path / form
    adapter = load_krona(loaded, tmp_path / form)
    assert list(adapter.components) == ["unet", *["text_encoder", "text_encoder_2"] * text_encoders]
    assert np.array_equal(render(loaded), render(pipe))
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    assert loaded.get_list_adapters().keys() == adapter.components.keys()


@FORMS
@pytest.mark.parametrize("source", ["pipeline", "unet"])
@pytest.mark.parametrize("target", ["pipeline", "unet", "peft"])
def test_a_pipelines_adapter_and_a_bare_unets_are_interchangeable(
    tmp_path: Path, form: str, source: str, target: str
) -> None:
    pipe, other = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(pipe, config(), text_encoders=source == "pipeline")
    save_krona(pipe if source == "pipeline" else pipe.unet, tmp_path / form)
    model = other if target == "pipeline" else other.unet
    if target == "peft":
        model = get_peft_model(other.unet, config(target_modules=["to_q"]), "first")
    if source == "pipeline" and target != "pipeline":
        with pytest.warns(UserWarning, match="holds an adapter for text_encoder, unet, but this model has no named"):
            load_krona(model, tmp_path / form, "second", on_unused="warn")
    else:
        load_krona(model, tmp_path / form, "second")
    if target == "peft":
        model.set_adapter("second")
        other.unet = model.get_base_model()
    assert_same_factors(other.unet, pipe.unet, "second")


def test_a_components_folder_loads_with_peft(tmp_path: Path) -> None:
    pipe, loaded = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(pipe, config(factor_pattern={"to_k|k_proj": (8, 2)}), text_encoders=True)
    save_krona(pipe, tmp_path)
    for part in ("unet", "text_encoder"):
        wrapped = PeftModel.from_pretrained(getattr(loaded, part), tmp_path / part)
        setattr(loaded, part, wrapped.get_base_model())
    assert np.array_equal(render(loaded), render(pipe))


def test_what_peft_saved_loads(tmp_path: Path) -> None:
    model, loaded = get_peft_model(network(), config(a1=2)), network()
    model.save_pretrained(tmp_path)
    load_krona(loaded, tmp_path)
    assert torch.equal(output(loaded), output(model))


def test_what_peft_saved_under_a_name_loads_from_the_names_folder(tmp_path: Path) -> None:
    model, loaded = get_peft_model(network(), config(a1=2), "cat"), network()
    model.save_pretrained(tmp_path)
    with unchanged(loaded), pytest.raises(AdapterFileError, match=r"It holds: README\.md, cat"):
        load_krona(loaded, tmp_path)
    load_krona(loaded, tmp_path / "cat")
    assert torch.equal(output(loaded), output(model))


def test_a_peft_model_saves_and_loads_by_its_base_model(tmp_path: Path) -> None:
    model, loaded = get_peft_model(network(), config(a1=2)), network()
    save_krona(model, tmp_path)
    load_krona(loaded, tmp_path)
    assert torch.equal(output(loaded), output(model))


def test_a_loaded_adapter_is_active_beside_others_that_stay(tmp_path: Path) -> None:
    pipe, saved = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(saved, config())
    save_krona(saved, tmp_path)
    first = inject_krona(pipe, config(), "first")
    before = [factor.clone() for factor in first.parameters()]
    load_krona(pipe, tmp_path, "second")
    assert pipe.get_active_adapters() == ["second"]
    assert pipe.get_list_adapters() == {"unet": ["first", "second"]}
    assert np.array_equal(render(pipe), render(saved))
    assert all(torch.equal(a, b) for a, b in zip(before, first.parameters(), strict=True))
    assert trainable(pipe) == {id(parameter) for parameter in first.parameters()}


def test_a_loaded_adapter_trains_on_when_asked(tmp_path: Path) -> None:
    saved, model = network(), network()
    inject_krona(saved, config(a1=2))
    save_krona(saved, tmp_path)
    adapter = load_krona(model, tmp_path, trainable=True)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    train(adapter, model)
    assert not torch.equal(output(model), output(saved))


def test_loading_for_inference_leaves_a_lora_trainable(tmp_path: Path) -> None:
    pipe = tiny_sd_pipeline()
    pipe.unet.add_adapter(lora(), "lora")
    training = trainable(pipe)
    saved = tiny_sd_pipeline()
    inject_krona(saved, config())
    save_krona(saved, tmp_path)
    load_krona(pipe, tmp_path)
    assert trainable(pipe) == training


@FORMS
def test_modules_to_save_are_saved_and_loaded(tmp_path: Path, form: str) -> None:
    pipe, loaded = tiny_sd_pipeline(), tiny_sd_pipeline()
    adapter = inject_krona(pipe, config(modules_to_save=["conv_out"]))
    nn.init.normal_(dict(adapter.named_parameters())["unet.conv_out.weight"], std=0.1)
    save_krona(pipe, tmp_path / form)
    load_krona(loaded, tmp_path / form)
    assert np.array_equal(render(loaded), render(pipe))


def test_an_adapter_of_a_dropout_loads_without_randomness(tmp_path: Path) -> None:
    saved, model = network(), network()
    inject_krona(saved, config(a1=2, dropout=0.5))
    save_krona(saved, tmp_path)
    load_krona(model, tmp_path)
    assert torch.equal(output(model), output(saved))
    assert torch.equal(output(model), output(model))


@FORMS
def test_files_hold_the_factors_only_and_are_the_same_each_time(tmp_path: Path, form: str) -> None:
    pipe = tiny_sdxl_pipeline()
    adapter = inject_krona(pipe, config(target_modules={"to_q", "to_k", "to_v", "to_out.0"}))
    for again in range(4):
        save_krona(pipe, tmp_path / str(again) / form)
    assert all(contents(tmp_path / str(again)) == contents(tmp_path / "0") for again in range(4))
    (file,) = (tmp_path / "0").rglob("*.safetensors")
    assert sum(t.numel() for t in load_file(file).values()) == sum(p.numel() for p in adapter.parameters())
    assert {t.dtype for t in load_file(file).values()} == {torch.float32}
    header = file.stat().st_size - sum(4 * p.numel() for p in adapter.parameters())
    assert header < 2000 + 2 * 88 * 160


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = network()
    inject_krona(model, config(a1=2))
    assert save_krona(model, "~/my-dog.safetensors") == tmp_path / "my-dog.safetensors"
    load_krona(network(), "~/my-dog.safetensors")


@FORMS
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_factors_that_are_not_finite_are_not_saved(tmp_path: Path, form: str, value: float) -> None:
    model = network()
    inject_krona(model, config(a1=2))
    save_krona(model, tmp_path / form)
    before = contents(tmp_path)
    factors(model)["blocks.1.to_out.0.B"].data[0, 0] = value
    name = r"blocks\.1\.to_out\.0\.krona_B"
    with pytest.raises(AdapterFileError, match=rf"{name} of the model .*nothing was saved"):
        save_krona(model, tmp_path / form)
    assert contents(tmp_path) == before


def test_which_adapter_to_save_must_be_clear(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(AdapterNameError, match="There is no KronA adapter here"):
        save_krona(model, tmp_path / "x")
    inject_krona(model, config(a1=2), "one")
    inject_krona(model, config(a1=2), "two")
    with pytest.raises(AdapterNameError, match="by adapter_name which adapter is meant; there are: one, two"):
        save_krona(model, tmp_path / "x")
    with pytest.raises(AdapterNameError, match="No KronA adapter is named 'three'"):
        save_krona(model, tmp_path / "x", "three")
    assert not contents(tmp_path)


# Bad files


def good_file(folder: Path) -> Path:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config())
    return save_krona(pipe, folder / "good.safetensors")


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a file and keep its header's entries."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def first_key(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[first_key(tensors)]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["unet.conv_in.weight"] = torch.zeros(2)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first_key(tensors)] = tensors[first_key(tensors)].T.contiguous()


def flatten(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first_key(tensors)] = torch.tensor(1.0)


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first_key(tensors)][0, 0] = float("nan")


def overflow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first_key(tensors)] = tensors[first_key(tensors)].double() * 1e300


def whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first_key(tensors)] = tensors[first_key(tensors)].int()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"1 tensor\(s\) missing from the file: down_blocks.*krona_A"),
        (add, r"1 tensor\(s\) not in this model: conv_in\.weight"),
        (reshape, r"1 tensor\(s\) misshapen: .*krona_A is 8 × 4, not 4 × 8"),
        (flatten, r"1 tensor\(s\) misshapen: .*krona_A is a single number, not 4 × 8"),
        (spoil, r"1 tensor\(s\) without finite values: .*krona_A"),
        (overflow, r"1 tensor\(s\) without finite values: .*krona_A"),
        (whole_numbers, r"1 tensor\(s\) not of floating-point numbers: .*krona_A"),
    ],
)
def test_wrong_tensors_are_an_error_that_names_them(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    path, pipe = good_file(tmp_path), tiny_sd_pipeline()
    rewritten(path, change)
    with unchanged(pipe), pytest.raises(AdapterFileError, match=message):
        load_krona(pipe, path)


@BEFORE
def test_a_bad_file_leaves_a_pipeline_with_adapters_as_it_was(tmp_path: Path, before: Callable[[Any], None]) -> None:
    path, pipe = good_file(tmp_path), tiny_sd_pipeline()
    rewritten(path, spoil)
    before(pipe)
    with unchanged(pipe), pytest.raises(AdapterFileError):
        load_krona(pipe, path, "mine")


def test_wrong_copies_of_modules_to_save_are_an_error_that_names_them(tmp_path: Path) -> None:
    saved, model = network(), network()
    inject_krona(saved, config(a1=2, modules_to_save=["proj_out"]))
    path = save_krona(saved, tmp_path / "saved.safetensors")
    rewritten(path, lambda tensors: tensors.update({"proj_out.weight": torch.zeros(4, 7)}))
    with unchanged(model), pytest.raises(AdapterFileError, match=r"proj_out\.weight is 4 × 7, not 4 × 24"):
        load_krona(model, path)
    rewritten(path, lambda tensors: tensors.__delitem__("proj_out.weight"))
    with unchanged(model), pytest.raises(AdapterFileError, match=r"missing from the file: proj_out\.weight"):
        load_krona(model, path)


def test_an_adapter_for_another_architecture_is_an_error(tmp_path: Path) -> None:
    sd, sdxl = tiny_sd_pipeline(), tiny_sdxl_pipeline()
    inject_krona(sd)
    save_krona(sd, tmp_path / "sd")
    with unchanged(sdxl), pytest.raises(AdapterFileError, match="does not fit this UNet2DConditionModel"):
        load_krona(sdxl, tmp_path / "sd")
    with pytest.raises(AdapterFileError, match="It looks made for another architecture"):
        load_krona(flux(), tmp_path / "sd")


def test_an_adapter_for_a_component_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    sdxl, sd = tiny_sdxl_pipeline(), tiny_sd_pipeline()
    inject_krona(sdxl, text_encoders=True)
    save_krona(sdxl, tmp_path / "sdxl")
    with (
        unchanged(sd),
        pytest.raises(
            AdapterFileError,
            match="an adapter for text_encoder, text_encoder_2, unet, but this model has unet, text_encoder",
        ),
    ):
        load_krona(sd, tmp_path / "sdxl")


def test_a_lora_is_an_error_that_says_so(tmp_path: Path) -> None:
    pipe = tiny_sd_pipeline()
    get_peft_model(tiny_sd_pipeline().unet, lora()).save_pretrained(tmp_path / "peft")
    other = tiny_sd_pipeline()
    other.unet.add_adapter(lora())
    other.unet.save_lora_adapter(tmp_path / "diffusers")
    save_file({"unet.to_q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "bare.safetensors")
    for name in ("peft", "diffusers"):
        with unchanged(pipe), pytest.raises(AdapterFileError, match=r"holds LoRA updates.*merge_file\(pipe, path\)"):
            load_krona(pipe, tmp_path / name)
    with unchanged(pipe), pytest.raises(AdapterFileError, match="lacks up: it has only down"):
        load_krona(pipe, tmp_path / "bare.safetensors")


def test_a_name_that_is_taken_is_an_error(tmp_path: Path) -> None:
    path, pipe = good_file(tmp_path), tiny_sd_pipeline()
    one_lora(pipe)
    with unchanged(pipe), pytest.raises(AdapterNameError, match="already has an adapter named 'first'"):
        load_krona(pipe, path, "first")


# Damaged files


def small_file(folder: Path) -> bytes:
    torch.manual_seed(0)
    model = network()
    inject_krona(model, config(a1=2))
    return save_krona(model, folder / "small.safetensors").read_bytes()


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@examples(40)
@given(data=st.data())
def test_any_truncated_file_is_an_error_and_leaves_the_model_as_it_was(tmp_path: Path, data: st.DataObject) -> None:
    whole = small_file(tmp_path)
    header = 8 + int.from_bytes(whole[:8], "little")
    interesting = st.sampled_from([0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1])
    length = data.draw(interesting | st.integers(0, len(whole) - 1))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole[:length])
    model = network()
    with unchanged(model), pytest.raises(AdapterFileError, match="not a complete safetensors file"):
        load_krona(model, path)


@examples(150)
@given(data=st.data())
def test_any_flipped_byte_is_an_error_or_gives_finite_factors(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(small_file(tmp_path))
    header = 8 + int.from_bytes(whole[:8], "little")
    # Most bytes are factors, where any value will do; most of what can go wrong is in the header.
    position = st.integers(0, header - 1) | st.integers(0, len(whole) - 1)
    for index in data.draw(st.lists(position, min_size=1, max_size=3)):
        whole[index] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole)
    model = network()
    before = snapshot(model)
    try:
        load_krona(model, path)
    except AdapterFileError:
        assert_same(before, snapshot(model))
        return
    assert all(torch.isfinite(factor).all() for factor in factors(model).values())
    unload_krona(model)
    assert_same(before, snapshot(model))
