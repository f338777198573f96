"""Adapters as other programs' files: read back by us and by PEFT they are the same updates."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_file, save_krona
from diffusekrona.errors import AdapterFileError
from diffusekrona.tuner.injected import krona_layers
from tests import transformers
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline

MODELS = ["flux", "chroma", "flux2", "sd3", "zimage", "wan", "qwen_image"]


def trained(model: nn.Module, **config) -> nn.Module:
    """The model with an adapter of random factors, the same ones each time."""
    inject_krona(model, KronAConfig(**{"a1": 2, "a2": 2, "alpha": 0.5} | config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in sorted(krona_layers(model).items()):
            for factor in layer.parameters_of("default").values():
                factor.copy_(torch.randn(factor.shape, generator=generator))
    return model


def deltas(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_delta_weight("default").detach() for name, layer in krona_layers(model).items()}


def merged(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """What merging a file changes in each weight, whose layers it must all be."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    merge_file(model, path)
    return {name.removesuffix(".weight"): p.detach() for name, p in model.named_parameters() if p.any()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=tolerance, atol=tolerance * float(delta.abs().max()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", ["comfyui", "lora", "diffusers", "kohya"])
def test_every_familys_files_read_back_are_the_same_updates(name, format, tmp_path):
    build = getattr(transformers, name)
    path = tmp_path / "dog.safetensors"
    model = trained(build())
    try:
        save_krona(model, path, format=format)
    except AdapterFileError:
        assert format == "kohya"  # which has no name for single projections
        return
    same(merged(build(), path), deltas(model), 1e-5 if format == "lora" else 1e-6)


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "zimage"])
def test_projections_that_one_product_makes_are_written_as_the_fused_layer_that_they_came_from(name, tmp_path):
    """Also those that were cut into several products on the way, to the bit."""
    build = getattr(transformers, name)
    split = trained(build())
    source, back, copy = (tmp_path / f"{n}.safetensors" for n in ("source", "back", "copy"))
    save_krona(split, copy, format="comfyui")
    names = [key.removesuffix(".lokr_w1") for key in load_file(copy) if key.endswith(".lokr_w1")]
    fused = {
        "flux": "double_blocks.0.img_attn",
        "flux2": "double_blocks.0.img_attn",
        "sd3": "joint_blocks.0.x_block.attn",
        "zimage": "layers.0.attention",
    }[name]
    assert not any(f"{fused}.qkv" in one for one in names)
    width = 24 if name in ("flux2", "zimage") else 16
    tensors = {
        f"diffusion_model.{fused}.qkv.lokr_w1": torch.randn(4, 4),
        f"diffusion_model.{fused}.qkv.lokr_w2": torch.randn(3 * width // 4, width // 4),
        f"diffusion_model.{fused}.qkv.alpha": torch.tensor(1.0),
    }
    save_file(tensors, source)
    model = build()
    load_krona(model, source)
    assert len(krona_layers(model)) == 3
    save_krona(model, back, format="comfyui")
    found = load_file(back)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_a_fresh_adapter_keeps_its_layers_apart_whatever_becomes_of_it(tmp_path):
    model = transformers.flux()
    inject_krona(model, KronAConfig(a1=2, a2=4))
    save_krona(model, tmp_path / "dog.safetensors", format="comfyui")
    assert len([key for key in load_file(tmp_path / "dog.safetensors") if key.endswith("lokr_w1")]) == len(
        krona_layers(model)
    )


def test_what_is_several_products_there_is_refused_with_the_way_out_and_a_lora_holds_it(tmp_path):
    model, path = trained(transformers.flux()), tmp_path / "dog.safetensors"
    with pytest.raises(AdapterFileError, match=r"sum of \d products.*--to lora"):
        save_krona(model, path, format="kohya")
    assert not path.exists()
    save_krona(model, path, format="lora")
    same(merged(transformers.flux(), path), deltas(model), 1e-5)


def test_a_fused_models_adapter_is_written_under_the_names_of_its_projections(tmp_path):
    model = transformers.flux2()
    model.fuse_qkv_projections()
    trained(model, a1=3, a2=3, target_modules=["to_qkv"])
    save_krona(model, tmp_path / "dog.safetensors", format="sdnext")
    found = merged(transformers.flux2(), tmp_path / "dog.safetensors")
    (whole,) = deltas(model).values()
    assert torch.equal(torch.cat([found[f"transformer_blocks.0.attn.to_{x}"] for x in "qkv"]), whole)


@pytest.mark.parametrize("settings", [{}, {"num_terms": 2}, {"b_rank": 2}])
def test_a_lora_of_a_unet_with_its_text_encoder_is_exact_and_of_the_rank_that_is_said(settings, tmp_path):
    pipe, path = tiny_sd_pipeline(), tmp_path / "dog.safetensors"
    inject_krona(pipe, KronAConfig(a1=2, a2=4, **settings), text_encoders=True)
    for part in ("unet", "text_encoder"):
        with torch.no_grad():
            for layer in krona_layers(getattr(pipe, part)).values():
                for factor in layer.parameters_of("default").values():
                    factor.copy_(torch.randn(factor.shape))
    save_krona(pipe, path, format="lora")
    tensors = load_file(path)
    ranks = {len(t) for key, t in tensors.items() if key.endswith("lora_down.weight")}
    most = settings.get("num_terms", 1) * 2 * settings.get("b_rank", 10**6)
    assert max(ranks) <= most
    plain = tiny_sd_pipeline()
    before = {
        part: {n: p.clone() for n, p in getattr(plain, part).named_parameters()} for part in ("unet", "text_encoder")
    }
    merge_file(plain, path)
    for part in ("unet", "text_encoder"):
        changed = {
            n.removesuffix(".weight"): p - before[part][n]
            for n, p in getattr(plain, part).named_parameters()
            if not torch.equal(p, before[part][n])
        }
        expected = deltas(getattr(pipe, part))
        assert changed.keys() == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(changed[name], delta, rtol=1e-4, atol=1e-5)


def test_diffusers_loads_the_lora_as_it_is(tmp_path):
    pipe, plain = tiny_sd_pipeline(), tiny_sd_pipeline()
    model = trained(pipe.unet)
    save_krona(pipe, tmp_path / "dog.safetensors", format="lora")
    plain.load_lora_weights(tmp_path / "dog.safetensors")
    plain.fuse_lora()
    for name, delta in deltas(model).items():
        layer = plain.unet.get_submodule(name)
        base = model.get_submodule(name).base_layer
        torch.testing.assert_close(layer.base_layer.weight - base.weight, delta, rtol=1e-4, atol=1e-5)


def test_factors_that_are_products_are_multiplied_out_where_asked(tmp_path):
    model, path = trained(transformers.qwen_image(), a1=1, a2=1, b_rank=2), tmp_path / "dog.safetensors"
    save_krona(model, path, format="comfyui")
    assert any(key.endswith("lokr_w2_a") for key in load_file(path))
    save_krona(model, path, format="comfyui", whole=True)
    assert not any(key.endswith("lokr_w2_a") for key in load_file(path))
    same(merged(transformers.qwen_image(), path), deltas(model), 1e-6)


def test_only_what_predicts_noise_is_said_to(tmp_path):
    from safetensors import safe_open

    for model, expected in ((transformers.flux(), None), (tiny_sdxl_pipeline().unet, None)):
        trained(model)
        save_krona(model, tmp_path / "dog.safetensors", format="lokr")
        with safe_open(tmp_path / "dog.safetensors", "pt") as file:
            assert file.metadata().get("modelspec.prediction_type") == expected
