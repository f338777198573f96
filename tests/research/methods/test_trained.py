"""What each method trains, counted by formulas of its own paper and by PEFT, on tiny and on real shapes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from diffusekrona import load_krona
from diffusekrona.bases.architectures import build_pipeline
from diffusekrona.storage import read_safetensors
from research.methods import CustomDiffusion, FullDreamBooth, KronA, LoHa, LoKr, LoRA, MethodError, SVDiff
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.research.methods.cases import SDXL, name_of, picture, shake

QKVO = ["to_q", "to_k", "to_v", "to_out.0"]


def projections(unet):
    """(d, h) of every attention projection."""
    layers = {name: module for name, module in unet.named_modules() if name.endswith(tuple(QKVO))}
    return [tuple(layer.weight.shape) for name, layer in layers.items() if ".attn" in name]


@pytest.fixture(scope="module")
def sd():
    return SimpleNamespace(components=build_pipeline("sd15"))


def test_krona_by_its_formula(sd):
    sizes = projections(sd.components["unet"])
    assert len(sizes) == 128
    expected = sum(4 * 64 + (d // 4) * (h // 64) for d, h in sizes)
    assert KronA().count(sd) == expected == 398_048
    assert KronA(num_terms=3).count(sd) == 3 * expected
    squares = sum(64 + d // 8 * (h // 8) for d, h in sizes)
    assert KronA(factor_pattern={".*": (8, 8)}).count(sd) == squares
    assert KronA(text_encoders=True).count(sd) == expected + 48 * (4 * 64 + 192 * 12)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (LoRA(4), LoraConfig(r=4, target_modules=QKVO)),
        (LoKr(8), LoKrConfig(r=8, alpha=8, target_modules=QKVO)),
        (LoKr(2, factor=4), LoKrConfig(r=2, alpha=2, decompose_factor=4, target_modules=QKVO)),
        (LoKr(factor=8), LoKrConfig(r=10**6, alpha=10**6, decompose_factor=8, target_modules=QKVO)),
        (LoHa(4), LoHaConfig(r=4, alpha=4, target_modules=QKVO)),
        (
            LoHa(4, targets="attention+ff"),
            LoHaConfig(r=4, alpha=4, target_modules=[*QKVO, "ff.net.0.proj", "ff.net.2"]),
        ),
    ],
    ids=lambda value: name_of(value) if hasattr(value, "options") else "",
)
def test_pefts_methods_by_peft(sd, method, config):
    unet = build_pipeline("sd15")["unet"]
    inject_adapter_in_model(config, unet)
    assert method.count(sd) == sum(p.numel() for p in unet.parameters() if p.requires_grad)


def test_lora_and_loha_by_their_formula(sd):
    assert LoRA(4).count(sd) == 4 * sum(d + h for d, h in projections(sd.components["unet"])) == 797_184
    assert LoHa(4).count(sd) == 2 * LoRA(4).count(sd)


def test_whole_weights(sd):
    assert FullDreamBooth().count(sd) == 859_520_964
    assert FullDreamBooth(text_encoders=True).count(sd) == 859_520_964 + 123_060_480
    widths = [(320, 2)] * 5 + [(640, 2)] * 5 + [(1280, 2)] * 6  # 16 cross-attentions, K and V of each
    assert CustomDiffusion().count(sd) == sum(n * width * 768 for width, n in widths) == 19_169_280


def test_custom_diffusion_trains_k_and_v_of_cross_attention_and_nothing_else():
    pipe = tiny_sdxl_pipeline()
    parameters = CustomDiffusion().prepare(pipe)
    assert all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in parameters)
    assert len(parameters) == 2 * sum(module.endswith("attn2") for module, _ in pipe.unet.named_modules())
    pipe = tiny_sd3_pipeline()
    with pytest.raises(MethodError, match="SD3Transformer2DModel has none"):
        CustomDiffusion().prepare(pipe)


def test_svdiff_by_the_singular_values():
    pipe = tiny_sd_pipeline()
    ranks = []
    for component in (pipe.unet, pipe.text_encoder):
        for module in component.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter):
                rows = len(weight) if weight.dim() > 1 else 1
                ranks.append(len(torch.linalg.svdvals(weight.detach().reshape(rows, -1))))
    assert SVDiff(text_encoders=True).count(pipe) == sum(ranks)
    assert len(SVDiff(text_encoders=True).prepare(pipe)) == len(ranks)


@pytest.mark.parametrize("method", SDXL, ids=name_of)
def test_prepared_on_the_meta_device_as_counted(method):
    with torch.device("meta"):
        unet = type(tiny_sdxl_pipeline().unet).from_config(tiny_sdxl_pipeline().unet.config)
    expected = method.count(unet)
    parameters = method.prepare(unet)
    assert sum(p.numel() for p in parameters.values()) == expected
    assert all(p.is_meta for p in parameters.values())


def test_scales():
    pipe = tiny_sd_pipeline()
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for method, scale in (
        (LoRA(2), 1), (LoRA(2, alpha=4), 2), (LoHa(2), 1), (LoKr(factor=4), 1), (LoKr(2, alpha=1), 0.5),
    ):  # fmt: skip
        method.prepare(pipe)
        assert pipe.unet.get_submodule(layer).scaling["default"] == scale
        method.remove(pipe)


def test_targets():
    pipe = tiny_sd_pipeline()
    names = LoRA(2, targets=r".*attn1\.to_q").prepare(pipe)
    assert {name.rpartition(".lora_")[0].split(".", 1)[1] for name in names} == {
        name for name, _ in pipe.unet.named_modules() if name.endswith("attn1.to_q.lora_A")
        for name in [name.removesuffix(".lora_A")]
    }  # fmt: skip
    for targets, said in ((".*conv1", "no linear layer"), ("nothing", "no layer is named so")):
        with pytest.raises(MethodError, match=said):
            LoRA(2, targets=targets).count(tiny_sd_pipeline())


def test_diffusers_reads_what_lora_saves(tmp_path):
    pipe = tiny_sd_pipeline()
    method = LoRA(2, text_encoders=True)
    shake(method.prepare(pipe))
    method.save(pipe, tmp_path)
    other: StableDiffusionPipeline = tiny_sd_pipeline()
    other.load_lora_weights(tmp_path)
    assert (picture(other) == picture(pipe)).all()


def test_load_krona_reads_what_krona_saves(tmp_path):
    pipe = tiny_sd_pipeline()
    method = KronA(4, 16, num_terms=2, text_encoders=True)
    shake(method.prepare(pipe))
    path = method.save(pipe, tmp_path)
    other = tiny_sd_pipeline()
    load_krona(other, path)
    assert (picture(other) == picture(pipe)).all()
    assert set(read_safetensors(path)[1]) == {"krona", "diffusekrona_method"}
