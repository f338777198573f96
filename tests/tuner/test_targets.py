"""What "attention", "attention+ff" and "cross-attention" mean in the models of Diffusers and transformers."""

import diffusers
import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention import FeedForward
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_krona, save_krona
from diffusekrona.bases.architectures import build
from diffusekrona.errors import ConfigError
from diffusekrona.kron.shapes import stacked
from diffusekrona.tuner.injected import krona_layers
from diffusekrona.tuner.targets import common_and_pattern, layer_factors, layer_terms, target_layers, target_only
from tests.modules import inputs, network
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline

ATTENTION = {"to_q", "to_k", "to_v", "to_out.0"}


def tiny(name: str) -> nn.Module:
    with torch.device("meta"):
        return {
            "flux": lambda: FluxTransformer2DModel(
                in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
            ),
            "sd3": lambda: SD3Transformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
            ),
            "pixart": lambda: PixArtTransformer2DModel(
                sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16,
                caption_channels=8, norm_num_groups=1,
            ),
            "clip": lambda: CLIPTextModel(
                CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
            ),
            "t5": lambda: T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
            "t5-gated": lambda: T5EncoderModel(
                T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
            ),
        }[name]()  # fmt: skip


def chosen(model: nn.Module, word: str) -> set[str]:
    return set(target_layers(model, KronAConfig(target_modules=word)))


def endings(names: set[str], parts: int = 1) -> set[str]:
    """The last parts of dotted names, numbers not counted."""
    found = set()
    for name in names:
        pieces = name.split(".")
        count = 0
        for at in range(len(pieces) - 1, -1, -1):
            count += not pieces[at].isdigit()
            if count == parts:
                found.add(".".join(pieces[at:]))
                break
    return found


def test_attention_is_the_papers_560_projections_in_sdxl_and_cross_attention_half_of_them():
    unet = build("sdxl")
    attention = chosen(unet, "attention")
    assert len(attention) == 560
    assert endings(attention, 2) == {f"{a}.{p}" for a in ("attn1", "attn2") for p in ATTENTION}
    assert chosen(unet, "cross-attention") == {name for name in attention if ".attn2." in name}
    added = chosen(unet, "attention+ff") - attention
    assert len(added) == 140
    assert added == {n for n, m in unet.named_modules() if isinstance(m, nn.Linear) and ".ff.net." in n}


@pytest.mark.parametrize(
    ("name", "attention", "feed_forward"),
    [
        (
            "flux",
            ATTENTION | {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"},
            {"proj_mlp", "proj_out", "net.0.proj", "net.2"},
        ),
        ("sd3", ATTENTION | {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}, {"net.0.proj", "net.2"}),
        ("pixart", ATTENTION, {"net.0.proj", "net.2"}),
        ("clip", {"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
        ("t5", {"q", "k", "v", "o"}, {"wi", "wo"}),
        ("t5-gated", {"q", "k", "v", "o"}, {"wi_0", "wi_1", "wo"}),
    ],
)
def test_transformers_and_text_encoders_have_attention_and_feed_forward_layers(name, attention, feed_forward):
    model = tiny(name)
    assert {
        n.rpartition(".")[2] if not n.endswith("to_out.0") else "to_out.0" for n in chosen(model, "attention")
    } == attention
    added = chosen(model, "attention+ff") - chosen(model, "attention")
    assert {ending for ending in feed_forward if any(n.endswith(f".{ending}") for n in added)} == feed_forward
    assert all(n.endswith(tuple(f".{ending}" for ending in feed_forward)) for n in added)
    if name == "flux":
        assert "proj_out" not in added, "the model's own output is no feed-forward layer"
    assert all(isinstance(model.get_submodule(n), nn.Linear) for n in chosen(model, "attention+ff"))


def test_cross_attention_is_an_error_where_there_is_none():
    for name in ("flux", "sd3", "clip"):
        with pytest.raises(ConfigError, match=r"has no cross-attention.*choose \"attention\""):
            chosen(tiny(name), "cross-attention")
    assert {n.split(".")[2] for n in chosen(tiny("pixart"), "cross-attention")} == {"attn2"}


class Processor:
    pass


class OwnAttention(nn.Module):
    """As Diffusers' attention modules are marked, with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()
        self.query, self.own_to_q, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])

    def set_processor(self, processor: object) -> None:
        self.processor = processor


def test_any_attention_that_diffusers_marks_with_a_processor_is_found():
    unmarked = nn.Sequential(nn.Linear(4, 4))
    unmarked.processor = Processor()
    model = nn.ModuleDict({"own": OwnAttention(), "query": nn.Linear(4, 4), "image": unmarked})
    assert chosen(model, "attention") == {"own.query", "own.own_to_q", "own.out.0"}
    assert chosen(OwnAttention(), "attention") == {"query", "own_to_q", "out.0"}


def test_any_feed_forward_module_of_diffusers_is_found_by_its_class():
    model = nn.ModuleDict({"own": OwnAttention(), "expert": FeedForward(4), "proj": nn.Linear(4, 4)})
    added = chosen(model, "attention+ff") - chosen(model, "attention")
    assert added == {"expert.net.0.proj", "expert.net.2"}


@pytest.mark.parametrize(
    ("word", "other"),
    [
        ("attention", network),
        ("attention+ff", lambda: tiny_sd_pipeline().text_encoder),
        ("cross-attention", lambda: tiny_sdxl_pipeline().unet),
    ],
    ids=["attention", "attention+ff", "cross-attention"],
)
def test_a_word_is_looked_up_anew_in_each_model(word, other):
    config = KronAConfig(a1=2, a2=2, target_modules=word)
    for model in (tiny_sd_pipeline().unet, other()):
        assert set(target_layers(model, config)) == chosen(model, word)
        inject_krona(model, config)
        assert krona_layers(model).keys() == chosen(model, word)
    assert config.target_modules == word


def test_a_layer_that_has_other_adapters_counts_once():
    unet = build("sd15")
    attention = chosen(unet, "attention+ff")
    inject_adapter_in_model(LoraConfig(target_modules=["to_q", "ff.net.2"]), unet)
    assert chosen(unet, "attention+ff") == attention


def test_every_transformer_of_diffusers_that_stands_alone_has_attention():
    """Default configurations, on the meta device; those whose defaults cannot be built are passed over."""
    without, built = [], 0
    for name in sorted(n for n in dir(diffusers) if n.endswith("Transformer2DModel")):
        try:
            with torch.device("meta"):
                model = getattr(diffusers, name)()
        except Exception:
            continue
        built += 1
        if not chosen(model, "attention"):
            without.append(name)
    assert built > 10
    assert not without


def test_the_saved_config_names_layers_and_loads_into_a_model_of_its_kind(tmp_path):
    for word, make in (("attention", network), ("attention+ff", lambda: tiny_sd_pipeline().unet)):
        model = make()
        inject_krona(model, KronAConfig(a1=2, a2=2, target_modules=word, init_b="normal"))
        saved = save_krona(model, tmp_path / f"{word}.safetensors")
        other = make()
        load_krona(other, saved)
        assert krona_layers(other).keys() == krona_layers(model).keys()
        assert word not in str(other.peft_config["default"].target_modules)


def test_a_word_that_means_no_layer_here_is_an_error_and_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="not found in the base model"):
        inject_krona(model, KronAConfig(a1=2, a2=2))
    assert not krona_layers(model)
    assert not hasattr(model, "peft_config")


def test_each_component_of_a_pipeline_gets_its_own_meaning():
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, KronAConfig(a1=2, a2=2, target_modules="attention+ff"), text_encoders=True)
    assert endings(set(krona_layers(pipe.text_encoder))) >= {"q_proj", "fc1"}
    assert endings(set(krona_layers(pipe.unet))) >= {"to_q", "proj"}


names = st.lists(st.sampled_from(["a", "b", "ab", "0"]), min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(names, st.sampled_from([(1, 2), (2, 1), (4, 4)]), min_size=1, max_size=30))
def test_patterns_give_each_layer_its_factors_also_where_a_name_ends_as_another(shapes):
    (a1, a2), pattern = common_and_pattern(shapes)
    config = KronAConfig(a1=a1, a2=a2, factor_pattern=pattern)
    assert {name: layer_factors(config, name, 0) for name in shapes} == shapes


def test_layers_that_share_a_value_share_a_pattern():
    shapes = {f"block.{number}.to_q": (2, 2) if number % 3 else (4, 4) for number in range(600)}
    common, pattern = common_and_pattern(shapes)
    assert common == (2, 2)
    assert len(pattern) == 1


class Tree(nn.Module):
    """A module at each of these dotted names and at all that lead to them."""

    def __init__(self, paths):
        super().__init__()
        for path in paths:
            parent = self
            for part in path.split("."):
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)


@given(st.sets(names, min_size=1, max_size=20), st.data())
def test_a_config_can_target_any_set_of_layers_and_no_other(paths, data):
    model = Tree(paths)
    chosen = data.draw(st.sets(st.sampled_from(sorted(name for name, _ in model.named_modules() if name)), min_size=1))
    config = KronAConfig()
    target_only(config, model, chosen)
    assert set(target_layers(model, config)) == chosen


def test_the_first_pattern_that_matches_says_how_many_terms_a_layer_has():
    config = KronAConfig(num_terms=2, terms_pattern={"to_q": 3, r"blocks\.1\..*": 5})
    assert [layer_terms(config, name) for name in ("blocks.1.to_q", "blocks.1.to_k", "blocks.0.to_k")] == [3, 5, 2]


@pytest.mark.parametrize("form", ["dog", "dog.safetensors"])
def test_terms_of_a_layers_own_are_saved_loaded_computed_and_merged(form, tmp_path):
    trained = network()
    config = KronAConfig(a1=2, a2=8, init_weights=False, terms_pattern={r"blocks\.1\.to_q": 3, "to_k": 2})
    inject_krona(trained, config)
    model = network()
    load_krona(model, save_krona(trained, tmp_path / form))
    layers = krona_layers(model)
    assert {name: layer.shapes("default").num_terms for name, layer in layers.items() if "blocks.1" in name} == {
        "blocks.1.to_q": 3,
        "blocks.1.to_k": 2,
        "blocks.1.to_v": 1,
        "blocks.1.to_out.0": 1,
    }
    expected = network().double()
    for name, layer in layers.items():
        factors = (stacked(parameter.detach().double()) for parameter in layer.parameters_of("default").values())
        expected.get_submodule(name).weight.data += sum(torch.kron(*term) for term in zip(*factors, strict=True))
    found = [model(*inputs())]
    merge_krona(model)
    found.append(model(*inputs()))
    for output in found:
        torch.testing.assert_close(output.double(), expected(*inputs(torch.float64)), rtol=1e-4, atol=1e-4)
