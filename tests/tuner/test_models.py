"""Each model family, tiny and with random weights, through everything that an adapter goes through.

What is expected comes from elsewhere: the layers from the models' classes and their names, the outputs and gradients
from copies of the base whose weights are W + s · A ⊗ B by `torch.kron`.
"""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogVideoXTransformer3DModel,
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    Kandinsky5Transformer3DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_krona, save_krona, unload_krona, unmerge_krona
from diffusekrona.errors import ConfigError
from tests.snapshots import assert_same, bits, snapshot

TEXT, POOLED = 24, 8  # widths of a prompt's embeddings
SCALE = 0.5

rand = torch.randn


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        make: a tiny model of it.
        inputs: of its forward function.
        attention: how many attention projections it has.
        feed_forward: what the names of its feed-forward layers end with; None if they are convolutions.
        cross_attention: what the names of its cross-attention modules end with; None if it has none.
        idle: attention projections that the output does not depend on, as the last block's for the text.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    attention: int
    feed_forward: str | None
    cross_attention: str | None = None
    idle: str = "none"


def text(length: int = 5) -> torch.Tensor:
    return rand(2, length, TEXT)


def times(value: float) -> torch.Tensor:
    return torch.tensor([value, value])


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
LATENTS = {"sample_size": 8, "patch_size": 2, "in_channels": 4}
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
STABLE_DIFFUSION_3 = {"num_layers": 2, "joint_attention_dim": TEXT, "pooled_projection_dim": POOLED}
CLIP = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

unet = functools.partial(UNet2DConditionModel, sample_size=8, cross_attention_dim=TEXT, **BLOCKS)
sd3 = functools.partial(
    SD3Transformer2DModel, **LATENTS, **HEADS, **STABLE_DIFFUSION_3, caption_projection_dim=16, pos_embed_max_size=4
)
pixart = functools.partial(
    PixArtTransformer2DModel, **LATENTS, num_layers=1, num_attention_heads=2, attention_head_dim=12, out_channels=8,
    cross_attention_dim=24, caption_channels=TEXT, norm_num_groups=1,
)  # fmt: skip
wan = functools.partial(
    WanTransformer3DModel, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=TEXT,
    freq_dim=8, ffn_dim=32, num_layers=1, rope_max_seq_len=8,
)  # fmt: skip


def clip_config(**fields: Any) -> CLIPTextConfig:
    return CLIPTextConfig(**CLIP, max_position_embeddings=8, bos_token_id=48, eos_token_id=49, **fields)


def t5(feed_forward: str) -> T5EncoderModel:
    shape = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(**shape, feed_forward_proj=feed_forward))


def noise() -> dict[str, Any]:
    return {"timestep": times(7.0), "encoder_hidden_states": text()}


def latents() -> dict[str, Any]:
    return {"hidden_states": rand(2, 4, 8, 8), **noise()}


def frames() -> dict[str, Any]:
    return {"hidden_states": rand(2, 4, 2, 4, 4), **noise()}


def patches(channels: int) -> dict[str, Any]:
    return {"hidden_states": rand(2, 4, channels), **noise()}


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.tensor([[0, 1, 2, 3, 49], [4, 5, 6, 7, 49]])}  # the last one ends a text for CLIP


FF = r"\.ff\.net\.(0\.proj|2)"
FAMILIES = {
    "sd1": Family(unet, lambda: {"sample": rand(2, 4, 8, 8), **noise()}, 32, FF, "attn2"),
    "sd2": Family(
        functools.partial(unet, attention_head_dim=[2, 4], use_linear_projection=True),
        lambda: {"sample": rand(2, 4, 8, 8), **noise()}, 32, FF, "attn2",
    ),
    "sdxl": Family(
        functools.partial(
            unet, attention_head_dim=[2, 4], use_linear_projection=True, transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + POOLED,
        ),
        lambda: {
            "sample": rand(2, 4, 8, 8), **noise(),
            "added_cond_kwargs": {"text_embeds": rand(2, POOLED), "time_ids": torch.ones(2, 6)},
        },
        40, FF, "attn2",
    ),
    "sd3": Family(
        sd3, lambda: {**latents(), "pooled_projections": rand(2, POOLED)},
        15, r"\.(ff|ff_context)\.net\.(0\.proj|2)", idle=r"blocks\.1\.attn\.add_q_proj",
    ),
    "sd3.5": Family(
        functools.partial(sd3, dual_attention_layers=(0,), qk_norm="rms_norm"),
        lambda: {**latents(), "pooled_projections": rand(2, POOLED)},
        19, r"\.(ff|ff_context)\.net\.(0\.proj|2)", idle=r"blocks\.1\.attn\.add_q_proj",
    ),
    "flux": Family(
        functools.partial(
            FluxTransformer2DModel, in_channels=4, num_layers=1, num_single_layers=1, **HEADS, guidance_embeds=True,
            joint_attention_dim=TEXT, pooled_projection_dim=POOLED, axes_dims_rope=(2, 2, 4),
        ),
        lambda: {
            **patches(4), "pooled_projections": rand(2, POOLED), "guidance": times(3.0),
            "img_ids": torch.ones(4, 3), "txt_ids": torch.zeros(5, 3),
        },
        11, r"\.(ff|ff_context)\.net\.(0\.proj|2)|single_transformer_blocks\.0\.proj_(mlp|out)",
    ),
    "pixart-alpha": Family(
        functools.partial(pixart, use_additional_conditions=True),
        lambda: {**latents(), "added_cond_kwargs": {"resolution": rand(2, 2), "aspect_ratio": rand(2, 1)}},
        8, FF, "attn2",
    ),
    "pixart-sigma": Family(
        functools.partial(pixart, use_additional_conditions=False, interpolation_scale=2),
        lambda: {**latents(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, 8, FF, "attn2",
    ),
    "sana": Family(
        functools.partial(
            SanaTransformer2DModel, in_channels=4, out_channels=4, num_layers=1, **HEADS, sample_size=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT,
        ),
        latents, 8, None, "attn2",
    ),
    "hunyuan-dit": Family(
        functools.partial(
            HunyuanDiT2DModel, **LATENTS, **HEADS, hidden_size=16, num_layers=4, cross_attention_dim=TEXT,
            cross_attention_dim_t5=TEXT, pooled_projection_dim=POOLED, text_len=5, text_len_t5=4,
        ),
        lambda: {
            **latents(), "text_embedding_mask": torch.ones(2, 5), "encoder_hidden_states_t5": text(4),
            "text_embedding_mask_t5": torch.ones(2, 4), "image_meta_size": torch.ones(2, 6),
            "style": torch.zeros(2, dtype=torch.long), "image_rotary_emb": (rand(16, 8), rand(16, 8)),
        },
        32, FF, "attn2",
    ),
    "auraflow": Family(
        functools.partial(
            AuraFlowTransformer2DModel, **LATENTS, **HEADS, num_mmdit_layers=1, num_single_dit_layers=1,
            joint_attention_dim=TEXT, caption_projection_dim=16, pos_embed_max_size=16,
        ),
        latents, 12, r"\.(ff|ff_context)\.(linear_1|linear_2|out_projection)",
    ),
    "lumina-next": Family(
        functools.partial(
            LuminaNextDiT2DModel, **LATENTS, hidden_size=16, num_layers=1, num_attention_heads=2, num_kv_heads=1,
            multiple_of=8, cross_attention_dim=TEXT,
        ),
        lambda: {
            **latents(), "encoder_mask": torch.ones(2, 5), "cross_attention_kwargs": {},
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 4), rand(8, 8, 4)),
        },
        7, r"\.feed_forward\.linear_[123]", "attn2",
    ),
    "lumina2": Family(
        functools.partial(
            Lumina2Transformer2DModel, **LATENTS, hidden_size=24, num_layers=1, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(16, 16, 16),
            cap_feat_dim=TEXT,
        ),
        lambda: {**latents(), "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool)},
        12, r"\.feed_forward\.linear_[123]",
    ),
    "cogview4": Family(
        functools.partial(
            CogView4Transformer2DModel, **LATENTS, **HEADS, out_channels=4, num_layers=1, text_embed_dim=TEXT,
            time_embed_dim=8, condition_dim=4, rope_axes_dim=(8, 8),
        ),
        lambda: {
            **latents(), "encoder_hidden_states": text(16), "original_size": torch.ones(2, 2),
            "target_size": torch.ones(2, 2), "crop_coords": torch.ones(2, 2),
        },
        4, FF,
    ),
    "cogvideox": Family(
        functools.partial(
            CogVideoXTransformer3DModel, **HEADS, in_channels=2, out_channels=4, time_embed_dim=8, num_layers=1,
            text_embed_dim=TEXT, sample_width=4, sample_height=4, sample_frames=13, max_text_seq_length=5,
        ),
        frames, 4, FF,
    ),
    "wan": Family(wan, frames, 8, r"\.ffn\.net\.(0\.proj|2)", "attn2"),
    "wan-image": Family(
        functools.partial(wan, image_dim=8, added_kv_proj_dim=24),
        lambda: {**frames(), "encoder_hidden_states": text(512), "encoder_hidden_states_image": rand(2, 3, 8)},
        10, r"\.ffn\.net\.(0\.proj|2)|image_embedder\.ff\.net\.(0\.proj|2)", "attn2",
    ),
    "qwen-image": Family(
        functools.partial(
            QwenImageTransformer2DModel, in_channels=16, out_channels=4, num_layers=2, **HEADS,
            joint_attention_dim=TEXT, axes_dims_rope=(2, 2, 4),
        ),
        lambda: {
            **patches(16), "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool),
            "img_shapes": [[(1, 2, 2)]] * 2,
        },
        16, r"\.(img|txt)_mlp\.net\.(0\.proj|2)", idle=r"blocks\.1\.attn\.(add_q_proj|to_add_out)",
    ),
    "flux2": Family(
        functools.partial(
            Flux2Transformer2DModel, in_channels=4, num_layers=1, num_single_layers=1, **HEADS,
            joint_attention_dim=TEXT, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
        ),
        lambda: {
            **patches(4), "guidance": times(3.0), "img_ids": torch.ones(4, 4), "txt_ids": torch.zeros(5, 4),
        },
        10, r"\.(ff|ff_context)\.linear_(in|out)",
    ),
    "z-image": Family(
        functools.partial(
            ZImageTransformer2DModel, in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=3, n_kv_heads=3,
            cap_feat_dim=TEXT, axes_dims=[4, 2, 2], axes_lens=[64, 16, 16],
        ),
        lambda: {"x": [rand(4, 1, 4, 4)], "t": torch.tensor([0.5]), "cap_feats": [rand(5, TEXT)]},
        12, r"\.feed_forward\.w[123]",
    ),
    "kandinsky5": Family(
        functools.partial(
            Kandinsky5Transformer3DModel, in_visual_dim=4, in_text_dim=TEXT, in_text_dim2=POOLED, time_dim=8,
            out_visual_dim=4, patch_size=(1, 2, 2), model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1,
            axes_dims=(2, 2, 4),
        ),
        lambda: {
            "hidden_states": rand(1, 1, 4, 4, 4), "encoder_hidden_states": rand(1, 5, TEXT),
            "timestep": torch.tensor([7.0]), "pooled_projections": rand(1, POOLED),
            "visual_rope_pos": [torch.arange(n) for n in (1, 2, 2)], "text_rope_pos": torch.arange(5),
        },
        12, r"\.feed_forward\.(in|out)_layer",
    ),
    "clip": Family(lambda: CLIPTextModel(clip_config()), tokens, 8, r"\.mlp\.fc[12]"),
    "clip-projection": Family(
        lambda: CLIPTextModelWithProjection(clip_config(projection_dim=POOLED)), tokens, 8, r"\.mlp\.fc[12]"
    ),
    "t5": Family(functools.partial(t5, "relu"), tokens, 8, r"\.DenseReluDense\.w[io]"),
    "t5-gated": Family(functools.partial(t5, "gated-gelu"), tokens, 8, r"\.DenseReluDense\.(wi_0|wi_1|wo)"),
}  # fmt: skip
OTHER_PROGRAMS = pytest.mark.filterwarnings(
    "ignore:(Diffusers by itself refuses factors|Diffusers reads no LoKr of text|It is not known whether ComfyUI)"
)
FORMS = pytest.mark.parametrize(
    ("path", "form"),
    [
        ("dog", "krona"),
        ("dog.safetensors", "krona"),
        ("dog.safetensors", "lokr"),
        ("dog.safetensors", "lokr-diffusers"),
    ],
    ids=["folder", "file", "lokr", "lokr-diffusers"],
)


families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def build(family: Family) -> nn.Module:
    """A model in evaluation mode, always the same, none of whose weights is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.make().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model


def inputs(family: Family) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {**family.inputs(), "return_dict": False}


def output(model: nn.Module, family: Family) -> torch.Tensor:
    with torch.no_grad():
        return first(model(**inputs(family)))


def first(returned: Any) -> torch.Tensor:
    sample = returned[0]
    return torch.stack(sample) if isinstance(sample, list) else sample


def config(word: str = "attention") -> KronAConfig:
    return KronAConfig(a1=4, a2=2, alpha=SCALE, target_modules=word)


def inject(model: Any, word: str = "attention", **arguments: Any) -> dict[str, nn.Parameter]:
    """The factors, by name, of a new adapter."""
    return dict(inject_krona(model, config(word), **arguments).named_parameters())


def fill(factors: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The same factors, with random values."""
    generator = torch.Generator().manual_seed(2)
    for factor in factors.values():
        nn.init.normal_(factor, std=0.5, generator=generator)
    return factors


def layers(names: Iterable[str]) -> set[str]:
    """The layers that parameters of an adapter belong to."""
    return {name.rpartition(".krona_")[0] for name in names}


def reference(family: Family, factors: dict[str, torch.Tensor], scale: float = SCALE) -> torch.Tensor:
    """The output of the base model with s · A ⊗ B in its weights."""
    base = build(family).requires_grad_(False)
    weights = {
        f"{layer}.weight": base.get_parameter(f"{layer}.weight")
        + scale * torch.kron(factors[f"{layer}.krona_A"], factors[f"{layer}.krona_B"])
        for layer in layers(factors)
    }
    return first(functional_call(base, weights, kwargs=inputs(family)))


def assert_near(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.detach().abs().max()))


def projections(model: nn.Module) -> set[str]:
    """The linear layers of all attention modules."""
    modules = dict(model.named_modules())
    attentions = tuple(f"{name}." for name, module in modules.items() if type(module).__name__.endswith("Attention"))
    return {name for name, module in modules.items() if isinstance(module, nn.Linear) and name.startswith(attentions)}


def chosen(family: Family, word: str) -> set[str]:
    return layers(inject(build(family), word))


@families
def test_attention_is_every_projection_of_the_attention_modules(family: Family) -> None:
    expected = projections(build(family))
    assert len(expected) == family.attention
    assert chosen(family, "attention") == expected


@families
def test_attention_and_feed_forward(family: Family) -> None:
    if family.feed_forward is None:
        with pytest.raises(ConfigError, match="has no feed-forward"):
            chosen(family, "attention+ff")
        return
    model = build(family)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    feed_forward = {name for name in names if re.search(f"({family.feed_forward})$", name)}
    assert feed_forward
    assert chosen(family, "attention+ff") == projections(model) | feed_forward


@families
def test_cross_attention(family: Family) -> None:
    if family.cross_attention is None:
        with pytest.raises(ConfigError, match="has no cross-attention"):
            chosen(family, "cross-attention")
        return
    expected = {name for name in projections(build(family)) if f".{family.cross_attention}." in name}
    assert expected
    assert chosen(family, "cross-attention") == expected


@families
def test_a_fresh_adapter_changes_nothing(family: Family) -> None:
    model = build(family)
    before = output(model, family)
    inject(model)
    assert_near(output(model, family), before)


@families
def test_outputs_and_gradients_are_those_of_the_products(family: Family) -> None:
    model = build(family)
    factors = fill(inject(model))
    got = first(model(**inputs(family)))
    got.square().sum().backward()
    copies = {name: factor.detach().clone().requires_grad_() for name, factor in factors.items()}
    expected = reference(family, copies)
    expected.square().sum().backward()
    assert_near(got, expected)
    assert (expected - output(build(family), family)).abs().max() > 0.02 * expected.abs().max()
    for name, factor in factors.items():
        if re.search(f"({family.idle})$", name.rpartition(".krona_")[0]):
            assert factor.grad is None or not factor.grad.any()
        else:
            assert copies[name].grad.abs().max() > 0
            assert_near(factor.grad, copies[name].grad, 3e-4)
    rest = [parameter for name, parameter in model.named_parameters() if ".krona_" not in name]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in rest)


@OTHER_PROGRAMS
@FORMS
@families
def test_what_was_saved_loads_into_a_fresh_model(tmp_path: Path, family: Family, path: str, form: str) -> None:
    model, fresh = build(family), build(family)
    fill(inject(model))
    expected = output(model, family)
    # ComfyUI has no Sana, and no names for single projections of Lumina 2.
    form = "diffusers" if form == "lokr" and type(model).__name__.startswith(("Sana", "Lumina2")) else form
    load_krona(fresh, save_krona(model, tmp_path / path, format=form))
    assert torch.equal(output(fresh, family), expected)


@families
def test_merge_unmerge_and_unload(family: Family) -> None:
    model = build(family)
    before, weights, base = snapshot(model), bits(model), output(model, family)
    fill(inject(model))
    expected = output(model, family)
    merge_krona(model)
    assert_near(output(model, family), expected)
    assert bits(model) != weights
    unmerge_krona(model)
    assert bits(model) == weights
    assert torch.equal(output(model, family), expected)
    merge_krona(model)
    unload_krona(model)
    assert_same(before, snapshot(model))
    assert torch.equal(output(model, family), base)


PIPELINES = {
    "sd1": {"unet": "sd1", "text_encoder": "clip"},
    "sdxl": {"unet": "sdxl", "text_encoder": "clip", "text_encoder_2": "clip-projection"},
    "sd3": {
        "transformer": "sd3.5", "text_encoder": "clip-projection", "text_encoder_2": "clip-projection",
        "text_encoder_3": "t5-gated",
    },
    "flux": {"transformer": "flux", "text_encoder": "clip", "text_encoder_2": "t5-gated"},
    "pixart": {"transformer": "pixart-sigma", "text_encoder": "t5-gated"},
}  # fmt: skip


@OTHER_PROGRAMS
@FORMS
@pytest.mark.parametrize("parts", PIPELINES.values(), ids=PIPELINES)
def test_a_pipeline_with_its_text_encoders(tmp_path: Path, parts: dict[str, str], path: str, form: str) -> None:
    pipe, fresh = (SimpleNamespace(components={part: build(FAMILIES[n]) for part, n in parts.items()}) for _ in "12")
    expected = {f"{part}.{name}" for part, model in fresh.components.items() for name in projections(model)}
    assert layers(fill(inject(pipe, text_encoders=True))) == expected
    load_krona(fresh, save_krona(pipe, tmp_path / path, format=form))
    for part, name in parts.items():
        adapted = output(pipe.components[part], FAMILIES[name])
        assert torch.equal(output(fresh.components[part], FAMILIES[name]), adapted)
        assert not torch.equal(output(build(FAMILIES[name]), FAMILIES[name]), adapted)


OWN_FUNCTIONS = {name: family for name, family in FAMILIES.items() if isinstance(build(family), PeftAdapterMixin)}


@pytest.mark.parametrize("family", OWN_FUNCTIONS.values(), ids=OWN_FUNCTIONS)
def test_the_models_own_adapter_functions(family: Family) -> None:
    model = build(family).requires_grad_(False)  # torch may add up in another order where weights can be trained
    before, base = snapshot(model), output(model, family)
    model.add_adapter(config(), "dog")
    factors = {name.replace(".dog", ""): factor for name, factor in model.named_parameters() if ".krona_" in name}
    fill(factors)
    assert layers(factors) == projections(build(family))
    model.set_adapters("dog", 0.5)
    weighted = output(model, family)
    assert_near(weighted, reference(family, factors, 0.5 * SCALE).detach())
    model.disable_adapters()
    assert torch.equal(output(model, family), base)
    model.enable_adapters()
    assert torch.equal(output(model, family), weighted)
    model.delete_adapters("dog")
    assert torch.equal(output(model, family), base)
    unload_krona(model)
    assert_same(before, snapshot(model))
