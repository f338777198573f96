"""Adapters of models with an IP-Adapter: what it brought along is none of the model's attention."""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from torch import nn

from diffusekrona import KronAConfig, inject_krona, load_krona, save_krona
from tests.pipelines import tiny_sd_pipeline

WORDS = pytest.mark.parametrize("word", ["attention", "attention+ff", "cross-attention"])


def config(**fields: object) -> KronAConfig:
    return KronAConfig(**{"a1": 4, "a2": 8, "init_weights": False, **fields})


def with_ip_adapter(plus: bool = False) -> nn.Module:
    """A tiny UNet with an IP-Adapter, whose projection of images has attention, too, if it is "plus"."""
    unet = tiny_sd_pipeline().unet
    width = unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {}
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(names):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        weights[f"{2 * number + 1}.to_k_ip.weight"] = random(hidden, width)
        weights[f"{2 * number + 1}.to_v_ip.weight"] = random(hidden, width)
    image = {"proj.weight": random(4 * width, 32), "proj.bias": random(4 * width)}
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    unet._load_ip_adapter_weights([{"image_proj": image | norm, "ip_adapter": weights}])
    if plus:
        projection = IPAdapterPlusImageProjection(32, width, 32, depth=1, dim_head=16, heads=2, num_queries=4)
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    return unet


def names_of(model: nn.Module, **fields: object) -> set[str]:
    return {name for name, _ in inject_krona(model, config(**fields)).named_parameters()}


@WORDS
@pytest.mark.parametrize("plus", [False, True])
def test_words_mean_the_layers_that_the_model_has_without_it(word, plus, tmp_path):
    model = with_ip_adapter(plus)
    assert names_of(model, target_modules=word) == names_of(tiny_sd_pipeline().unet, target_modules=word)
    path = save_krona(model, tmp_path / "a.safetensors")
    load_krona(tiny_sd_pipeline().unet, path)


@WORDS
@pytest.mark.parametrize("make", [with_ip_adapter, lambda: with_ip_adapter(plus=True)], ids=["plain", "plus"])
def test_adapters_of_a_model_without_one_load(word: str, make: Callable[[], nn.Module], tmp_path) -> None:
    plain = tiny_sd_pipeline().unet
    names = names_of(plain, target_modules=word)
    model = make()
    adapter = load_krona(model, save_krona(plain, tmp_path / "a.safetensors"))
    assert {name for name, _ in adapter.named_parameters()} == names


def test_its_projections_are_adapted_where_they_are_named(tmp_path):
    model = with_ip_adapter()
    names = names_of(model, target_modules=r".*\.to_[kv]_ip\.0")
    assert len(names) == 28
    assert all("_ip.0." in name for name in names)
    path = save_krona(model, tmp_path / "a.safetensors")
    assert len(list(load_krona(with_ip_adapter(), path).parameters())) == 28
