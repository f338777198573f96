"""KronA through the adapter functions of Diffusers' pipelines and models, and of transformers' models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffusekrona import KronAConfig, inject_krona, load_krona, save_krona, unload_krona
from diffusekrona.errors import FactorShapeError
from diffusekrona.tuner.injected import krona_layers
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.snapshots import assert_same, bits, snapshot, unchanged


def config(**fields: Any) -> KronAConfig:
    """Factors of 4 × 8 that start random, so that an adapter changes the output at once."""
    return KronAConfig(**{"a1": 4, "a2": 8, "init_weights": False, **fields})


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=1, target_modules=["to_q", "to_k"], init_lora_weights=False)


def adapted(*names: str) -> StableDiffusionPipeline:
    """A pipeline with a KronA adapter of each name in its UNet, all of them active."""
    pipe = tiny_sd_pipeline()
    torch.manual_seed(0)
    for name in names:
        pipe.unet.add_adapter(config(), name)
    pipe.set_adapters(list(names))
    return pipe


def render(pipe: Any, **arguments: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "generator": generator, "output_type": "np", **arguments}
    return pipe("a cat", **arguments).images


def assert_same_pictures(pictures: np.ndarray, others: np.ndarray) -> None:
    np.testing.assert_allclose(pictures, others, atol=2e-4)


def differ(pictures: np.ndarray, others: np.ndarray) -> bool:
    return bool(np.abs(pictures - others).max() > 2e-3)


def dense_reference(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A pipeline without adapters whose weights hold the active adapters' updates."""
    reference = tiny_sd_pipeline()
    for part in ("unet", "text_encoder"):
        for name, layer in getattr(pipe, part).named_modules():
            if isinstance(layer, BaseTunerLayer):
                base = getattr(reference, part).get_submodule(name.replace(".base_layer", ""))
                for adapter in set(layer.active_adapters) & layer._get_available_adapters():
                    base.weight.data += layer.get_delta_weight(adapter).detach()
    return reference


def scalings(pipe: StableDiffusionPipeline, adapter: str, block: str) -> set[float]:
    layers = krona_layers(pipe.unet)
    return {layer.scaling[adapter] for name, layer in layers.items() if name.startswith(block)}


# A model's own functions


def test_add_adapter_adapts_every_attention_projection_and_trains_only_factors() -> None:
    pipe = tiny_sd_pipeline()
    pipe.unet.add_adapter(KronAConfig(a1=4, a2=8))
    trainable = [name for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad]
    assert len(krona_layers(pipe.unet)) == 7 * 8
    assert len(trainable) == 2 * 7 * 8
    assert all(name.endswith((".krona_A.default", ".krona_B.default")) for name in trainable)
    assert_same_pictures(render(pipe), render(tiny_sd_pipeline()))


def test_the_adapter_computes_the_kronecker_products() -> None:
    pipe = adapted("one", "two")
    assert_same_pictures(render(pipe), render(dense_reference(pipe)))
    assert differ(render(pipe), render(tiny_sd_pipeline()))


def test_set_adapter_and_active_adapters() -> None:
    pipe = adapted("one", "two")
    pipe.unet.set_adapter("one")
    assert pipe.unet.active_adapters() == ["one"]
    first = render(pipe)
    pipe.unet.set_adapter(["one", "two"])
    assert pipe.unet.active_adapters() == ["one", "two"]
    assert_same_pictures(render(pipe), render(dense_reference(pipe)))
    assert differ(render(pipe), first)


def test_disable_adapters_and_enable_adapters() -> None:
    pipe = adapted("one")
    with_adapter = render(pipe)
    pipe.unet.disable_adapters()
    assert np.array_equal(render(pipe), render(tiny_sd_pipeline()))
    pipe.unet.enable_adapters()
    assert np.array_equal(render(pipe), with_adapter)


def test_delete_adapters_of_one_adapter_keeps_the_other() -> None:
    pipe, alone = adapted("one", "two"), adapted("one")
    pipe.unet.delete_adapters("two")
    assert list(pipe.unet.peft_config) == ["one"]
    assert np.array_equal(render(pipe), render(alone))


def test_delete_adapters_of_the_last_adapter_and_unload_krona_leave_the_base() -> None:
    pipe = tiny_sd_pipeline()
    pictures, before = render(pipe), snapshot(pipe)
    inject_krona(pipe, config())
    pipe.delete_adapters("default")
    assert np.array_equal(render(pipe), pictures)
    unload_krona(pipe)
    assert_same(before, snapshot(pipe))


def test_save_lora_adapter_writes_what_load_krona_reads(tmp_path: Path) -> None:
    pipe, loaded = adapted("one"), tiny_sd_pipeline()
    pipe.unet.save_lora_adapter(tmp_path, adapter_name="one")
    load_krona(loaded, tmp_path)
    assert np.array_equal(render(loaded), render(pipe))


def test_save_lora_adapter_under_a_lora_writes_what_load_krona_reads(tmp_path: Path) -> None:
    pipe, loaded = adapted("one"), tiny_sd_pipeline()
    expected = render(pipe)
    pipe.unet.add_adapter(lora(), "lora")
    pipe.unet.save_lora_adapter(tmp_path, adapter_name="one")
    load_krona(loaded, tmp_path)
    assert np.array_equal(render(loaded), expected)


def nothing(pipe: StableDiffusionPipeline) -> None:
    pass


def with_krona(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.add_adapter(config(), "first")


def with_lora(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.add_adapter(lora(), "first")


@pytest.mark.parametrize("before", [nothing, with_krona, with_lora])
def test_a_failed_add_adapter_leaves_the_unet_as_it_was_and_can_be_mended(
    before: Callable[[StableDiffusionPipeline], None],
) -> None:
    pipe = tiny_sd_pipeline()
    before(pipe)
    with unchanged(pipe), pytest.raises(FactorShapeError, match=r"attn1\.to_q: a1=3 does not divide its 64"):
        pipe.unet.add_adapter(config(a1=3), "mine")
    pipe.unet.add_adapter(config(), "mine")
    assert "mine" in pipe.get_list_adapters()["unet"]


# A pipeline's functions


def test_set_adapters_takes_one_weight() -> None:
    pipe = adapted("one")
    pipe.set_adapters("one", 0.5)
    assert scalings(pipe, "one", "") == {0.5}
    assert_same_pictures(render(pipe), render(dense_reference(pipe)))


def test_set_adapters_takes_a_weight_for_each_adapter_beside_its_alpha() -> None:
    pipe = adapted("one")
    pipe.unet.add_adapter(config(alpha=4.0), "two")
    pipe.set_adapters(["one", "two"], [0.5, -0.25])
    assert scalings(pipe, "one", "") == {0.5}
    assert scalings(pipe, "two", "") == {-1.0}
    assert_same_pictures(render(pipe), render(dense_reference(pipe)))


def test_set_adapters_takes_weights_for_blocks() -> None:
    pipe = adapted("one")
    pipe.set_adapters("one", {"unet": {"down": 0.5, "mid": 2.0, "up": {"block_0": 0.25, "block_1": 4.0}}})
    expected = {"down_blocks": 0.5, "mid_block": 2.0, "up_blocks.0": 0.25, "up_blocks.1": 4.0}
    assert {block: scalings(pipe, "one", block) for block in expected} == {
        block: {weight} for block, weight in expected.items()
    }
    assert_same_pictures(render(pipe), render(dense_reference(pipe)))


def test_get_active_adapters_and_get_list_adapters() -> None:
    pipe = adapted("one", "two")
    pipe.text_encoder.add_adapter(config(), "two")
    assert pipe.get_list_adapters() == {"unet": ["one", "two"], "text_encoder": ["two"]}
    pipe.set_adapters("one")
    assert pipe.get_active_adapters() == ["one"]


def test_fuse_lora_and_unfuse_lora_restore_the_weights_bit_for_bit() -> None:
    pipe = adapted("one", "two")
    before, unfused = bits(pipe.unet), render(pipe)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"one", "two"}
    assert_same_pictures(render(pipe), unfused)
    assert bits(pipe.unet) != before
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert bits(pipe.unet) == before
    assert np.array_equal(render(pipe), unfused)


def test_fuse_lora_takes_a_scale_and_names() -> None:
    pipe, other = adapted("one", "two"), adapted("one")
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["one"])
    pipe.set_adapters("one")
    other.set_adapters("one", 0.5)
    assert pipe.fused_loras == {"one"}
    assert_same_pictures(render(pipe), render(other))


def test_disable_lora_and_enable_lora() -> None:
    pipe = adapted("one")
    with_adapter = render(pipe)
    pipe.disable_lora()
    assert np.array_equal(render(pipe), render(tiny_sd_pipeline()))
    pipe.enable_lora()
    assert np.array_equal(render(pipe), with_adapter)


def test_disable_lora_while_fused_gives_the_base() -> None:
    pipe = adapted("one")
    pipe.fuse_lora()
    pipe.disable_lora()
    assert np.array_equal(render(pipe), render(tiny_sd_pipeline()))


def test_unload_lora_weights_gives_back_the_base() -> None:
    pipe = adapted("one", "two")
    pipe.unload_lora_weights()
    assert bits(pipe.unet) == bits(tiny_sd_pipeline().unet)
    assert not any(isinstance(module, BaseTunerLayer) for module in pipe.unet.modules())
    assert pipe.get_list_adapters() == {}


def test_unload_lora_weights_after_fuse_lora_keeps_the_fused_weights(tmp_path: Path) -> None:
    pipe = adapted("one")
    pipe.fuse_lora()
    fused = render(pipe)
    pipe.unload_lora_weights()
    assert np.array_equal(render(pipe), fused)
    pipe.save_pretrained(tmp_path)
    assert np.array_equal(render(StableDiffusionPipeline.from_pretrained(tmp_path)), fused)


def test_a_scale_at_call_time_holds_for_that_call() -> None:
    pipe, half = adapted("one"), adapted("one")
    full = render(pipe)
    half.set_adapters("one", 0.5)
    assert_same_pictures(render(pipe, cross_attention_kwargs={"scale": 0.5}), render(half))
    assert_same_pictures(render(pipe, cross_attention_kwargs={"scale": 0.0}), render(tiny_sd_pipeline()))
    assert_same_pictures(render(pipe), full)


def test_everything_works_on_a_pipeline_with_two_text_encoders() -> None:
    pipe = tiny_sdxl_pipeline()
    before = {part: bits(getattr(pipe, part)) for part in ("unet", "text_encoder", "text_encoder_2")}
    torch.manual_seed(0)
    inject_krona(pipe, config(), "one", text_encoders=True)
    pipe.set_adapters("one", {"unet": 0.5, "text_encoder": 2.0, "text_encoder_2": 0.0})
    for part, weight in (("unet", 0.5), ("text_encoder", 2.0), ("text_encoder_2", 0.0)):
        assert {layer.scaling["one"] for layer in krona_layers(getattr(pipe, part)).values()} == {weight}
    unfused = render(pipe)
    pipe.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    assert_same_pictures(render(pipe), unfused)
    pipe.unfuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    assert {part: bits(getattr(pipe, part)) for part in before} == before
    pipe.unload_lora_weights()
    assert np.array_equal(render(pipe), render(tiny_sdxl_pipeline()))


# Text encoders, through transformers


def test_a_text_encoders_add_set_disable_and_enable_adapter() -> None:
    pipe = tiny_sd_pipeline()
    torch.manual_seed(0)
    pipe.text_encoder.add_adapter(config(), "one")
    pipe.text_encoder.add_adapter(config(), "two")
    both = pipe.text_encoder.set_adapter(["one", "two"]) or render(pipe)
    assert_same_pictures(both, render(dense_reference(pipe)))
    pipe.text_encoder.set_adapter("one")
    assert pipe.text_encoder.active_adapters() == ["one"]
    assert differ(render(pipe), both)
    pipe.text_encoder.disable_adapters()
    assert np.array_equal(render(pipe), render(tiny_sd_pipeline()))
    pipe.text_encoder.enable_adapters()
    pipe.text_encoder.delete_adapter("two")
    assert list(pipe.text_encoder.peft_config) == ["one"]
    assert_same_pictures(render(pipe), render(dense_reference(pipe)))


def test_a_text_encoders_failed_add_adapter_leaves_it_as_it_was() -> None:
    pipe = tiny_sd_pipeline()
    with unchanged(pipe), pytest.raises(FactorShapeError, match=r"self_attn\.\w_proj: a1=3 does not divide"):
        pipe.text_encoder.add_adapter(config(a1=3))
    pipe.text_encoder.add_adapter(config())


def test_set_adapters_weighs_the_unet_and_the_text_encoder() -> None:
    pipe = adapted("one")
    pipe.text_encoder.add_adapter(config(), "one")
    pipe.set_adapters("one", {"unet": 0.5, "text_encoder": 2.0})
    assert scalings(pipe, "one", "") == {0.5}
    assert {layer.scaling["one"] for layer in krona_layers(pipe.text_encoder).values()} == {2.0}
    assert_same_pictures(render(pipe), render(dense_reference(pipe)))


def test_a_text_encoder_loads_what_save_krona_wrote(tmp_path: Path) -> None:
    pipe, loaded = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(pipe.text_encoder, config())
    save_krona(pipe.text_encoder, tmp_path)
    loaded.text_encoder.load_adapter(str(tmp_path))
    assert np.array_equal(render(loaded), render(pipe))


# Beside a LoRA


def save_lora(folder: Path) -> Path:
    pipe = tiny_sd_pipeline()
    torch.manual_seed(1)
    pipe.unet.add_adapter(lora())
    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return folder


def both(folder: Path, order: str) -> tuple[StableDiffusionPipeline, str]:
    """A pipeline with an adapter "krona" and a LoRA under the name Diffusers gives it, and that name."""
    pipe = tiny_sd_pipeline()
    save_lora(folder)
    for name in order.split():
        torch.manual_seed(0)
        if name == "krona":
            inject_krona(pipe, config(), "krona")
        else:
            pipe.load_lora_weights(str(folder))
    (lora_name,) = set(pipe.get_list_adapters()["unet"]) - {"krona"}
    pipe.set_adapters(["krona", lora_name])
    return pipe, lora_name


ORDERS = pytest.mark.parametrize("order", ["krona lora", "lora krona"])


@ORDERS
def test_krona_and_lora_are_weighed_and_add_up(tmp_path: Path, order: str) -> None:
    pipe, lora_name = both(tmp_path, order)
    pipe.set_adapters(["krona", lora_name], [0.5, 2.0])
    assert_same_pictures(render(pipe), render(dense_reference(pipe)))
    pictures = render(pipe)
    for name in ("krona", lora_name):
        pipe.set_adapters(name)
        assert differ(render(pipe), pictures)
        assert differ(render(pipe), render(tiny_sd_pipeline()))


@ORDERS
def test_krona_and_lora_fuse_and_unfuse(tmp_path: Path, order: str) -> None:
    pipe, _ = both(tmp_path, order)
    unfused = render(pipe)
    for _ in range(2):
        pipe.fuse_lora()
        assert_same_pictures(render(pipe), unfused)
        pipe.unfuse_lora()
        assert_same_pictures(render(pipe), unfused)


@ORDERS
def test_an_adapter_beside_a_lora_saves_as_if_it_were_alone(tmp_path: Path, order: str) -> None:
    pipe, _ = both(tmp_path / "lora", order)
    alone = tiny_sd_pipeline()
    torch.manual_seed(0)
    inject_krona(alone, config(), "krona")
    save_krona(pipe, tmp_path / "beside.safetensors")
    save_krona(alone, tmp_path / "alone.safetensors")
    assert (tmp_path / "beside.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


@ORDERS
def test_an_adapter_loads_beside_a_lora_and_another(tmp_path: Path, order: str) -> None:
    pipe, lora_name = both(tmp_path / "lora", order)
    other = tiny_sd_pipeline()
    inject_krona(other, config(a1=8))
    save_krona(other, tmp_path / "other")
    load_krona(pipe, tmp_path / "other", "other")
    pipe.set_adapters(["other"])
    assert_same_pictures(render(pipe), render(other))
    pipe.set_adapters(["krona", lora_name, "other"])
    assert_same_pictures(render(pipe), render(dense_reference(pipe)))


@ORDERS
def test_unloading_the_adapter_keeps_the_lora(tmp_path: Path, order: str) -> None:
    pipe, lora_name = both(tmp_path, order)
    alone = tiny_sd_pipeline()
    alone.load_lora_weights(str(tmp_path))
    pipe.fuse_lora()
    pipe.unfuse_lora()
    unload_krona(pipe)
    assert pipe.get_list_adapters() == {"unet": [lora_name]}
    assert not krona_layers(pipe.unet)
    assert_same_pictures(render(pipe), render(alone))


@ORDERS
def test_deleting_the_lora_keeps_the_adapter(tmp_path: Path, order: str) -> None:
    pipe, lora_name = both(tmp_path, order)
    alone = tiny_sd_pipeline()
    torch.manual_seed(0)
    inject_krona(alone, config(), "krona")
    pipe.delete_adapters(lora_name)
    assert_same_pictures(render(pipe), render(alone))


def test_a_lora_that_was_training_trains_on_after_an_adapter_was_there() -> None:
    pipe = tiny_sd_pipeline()
    pipe.unet.add_adapter(lora())
    before = snapshot(pipe)
    inject_krona(pipe, config(), "krona")
    assert not any(p.requires_grad for name, p in pipe.unet.named_parameters() if ".lora_" in name)
    unload_krona(pipe)
    assert_same(before, snapshot(pipe))


def test_the_base_stays_frozen_under_a_lora_that_came_later() -> None:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config(), "krona")
    pipe.unet.add_adapter(lora())
    unload_krona(pipe)
    trainable = {name for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)
    assert all(parameter.requires_grad for parameter in pipe.vae.parameters())


# Training


def test_training_steps_change_the_factors_and_nothing_else() -> None:
    pipe = tiny_sd_pipeline()
    pipe.unet.add_adapter(KronAConfig(a1=4, a2=8))
    before = bits(pipe.unet)
    parameters = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 64)
    for _ in range(2):
        predicted = pipe.unet(latents, torch.tensor([10, 500]), context).sample
        optimizer.zero_grad()
        nn.functional.mse_loss(predicted, torch.randn_like(predicted)).backward()
        optimizer.step()
    assert bits(pipe.unet) == before
    assert all(layer.krona_B["default"].abs().max() > 0 for layer in krona_layers(pipe.unet).values())
