"""Other programs' names of a model's layers, against Diffusers' own converters on whole UNets."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffusekrona import KronAConfig, inject_krona
from diffusekrona.bases import architectures
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.layouts.layout import Part
from diffusekrona.files.layouts.names import Target, foreign_names, layer_names, resolve
from diffusekrona.files.layouts.programs import layer_name, naming, original_layers
from diffusekrona.files.layouts.unet import original_names
from diffusekrona.files.read import opened
from tests.modules import network
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline


def original_unet_name(model, name):
    return original_names(model, [name]).get(name)


def named_for(program, component, name, models):
    """A layer's name in a program's file."""
    model = models[component]
    return layer_name(naming(program, component, model, models), name, original_layers(model, [name]).get(name))


def kohya_name(component, name, models):
    return named_for("kohya", component, name, models)


def diffusers_name(component, name, models):
    return named_for("diffusers", component, name, models)


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


@cache
def unet(name: str) -> nn.Module:
    return architectures.build(name)


@cache
def tiny_unet() -> nn.Module:
    return tiny_sdxl_pipeline().unet


def adaptable(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def components(pipe: Any) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: pipe.components[name] for name in names if name in pipe.components}


def every_layer(models: dict[str, nn.Module]) -> list[tuple[str, str]]:
    return [(part, name) for part, module in models.items() for name in adaptable(module)]


def whole(component: str, module: str) -> Target:
    """What a layer of a file stands for where it is one layer of the model, too."""
    return Target(component, (Part(module),))


# Against Diffusers' converters


@pytest.mark.parametrize("architecture", ["sdxl", "sd15"])
def test_kohyas_names_of_every_layer_are_those_that_diffusers_reads(architecture: str) -> None:
    model = unet(architecture)
    layers = adaptable(model)
    assert len(layers) > 280
    file = {
        f"{kohya_name('unet', name, {'unet': model})}.lora_{part}.weight": torch.tensor(index)
        for index, name in enumerate(layers)
        for part in ("up", "down")
    }
    mapped, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(file, model.config))
    found = {key: layers[int(index)] for key, index in convert_unet_state_dict_to_peft(mapped).items()}
    expected = {f"unet.{name}.lora_{part}.weight": name for name in layers for part in "AB"}
    assert found == expected


@pytest.mark.parametrize("architecture", ["sdxl", "sd15"])
def test_the_original_names_are_those_of_the_original_checkpoint(architecture: str) -> None:
    model = unet(architecture)
    layers = layer_names(model)
    checkpoint = {
        f"model.diffusion_model.{original_unet_name(model, name)}.{part}": torch.tensor(index)
        for index, name in enumerate(layers)
        for part in ("weight", "bias")
    }
    config = {**model.config, "class_embed_type": None}
    found = convert_ldm_unet_checkpoint(checkpoint, config)
    assert {key: layers[int(index)] for key, index in found.items() if key.endswith(".weight")} == {
        f"{name}.weight": name for name in layers
    }


def test_an_upsampler_comes_after_the_attention_or_else_in_its_place() -> None:
    assert original_unet_name(unet("sdxl"), "up_blocks.0.upsamplers.0.conv") == "output_blocks.2.2.conv"
    assert original_unet_name(unet("sd15"), "up_blocks.0.upsamplers.0.conv") == "output_blocks.2.1.conv"
    assert original_unet_name(unet("sd15"), "up_blocks.1.upsamplers.0.conv") == "output_blocks.5.2.conv"


@pytest.mark.parametrize("architecture", ["sdxl", "sd15"])
@pytest.mark.parametrize(
    "rename",
    [
        lambda model, name: f"lora_unet_{name}".replace(".", "_"),
        lambda model, name: f"lora_unet_{original_unet_name(model, name)}".replace(".", "_"),
        lambda model, name: f"lycoris_{name}".replace(".", "_"),
        lambda model, name: f"diffusion_model.{original_unet_name(model, name)}",
        lambda model, name: f"base_model.model.{name}",
        lambda model, name: f"unet.{name}",
        lambda model, name: name,
    ],
    ids=["Diffusers' blocks", "original blocks", "LyCORIS", "ComfyUI", "PEFT", "Diffusers", "a single model"],
)
def test_every_layer_is_found_under_every_name(architecture: str, rename: Callable[[nn.Module, str], str]) -> None:
    model = unet(architecture)
    keys = {rename(model, name): name for name in layer_names(model)}
    assert len(keys) == len(layer_names(model))
    assert resolve(keys, {"unet": model}) == {key: whole("unet", name) for key, name in keys.items()}
    assert resolve(keys, {"": model}) == {key: whole("", name) for key, name in keys.items()}


def test_the_attention_processors_of_older_diffusers_are_found() -> None:
    keys = [f"unet.{ATTENTION}.processor.{name}" for name in ("to_q", "to_k", "to_v", "to_out")]
    found = resolve(keys, {"unet": unet("sdxl")})
    layers = [f"{ATTENTION}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert list(found.values()) == [whole("unet", name) for name in layers]
    for key in (f"{ATTENTION}.processor.to_out", f"unet.{ATTENTION}.to_out", f"{ATTENTION}.to_out.0"):
        assert resolve([key], {"unet": unet("sdxl")}) == {key: whole("unet", f"{ATTENTION}.to_out.0")}


@pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline])
@pytest.mark.parametrize("naming", [kohya_name, diffusers_name])
def test_a_file_under_these_names_loads_in_diffusers_own_pipelines(
    tmp_path: Path, build: Callable[[], Any], naming: Callable[..., str]
) -> None:
    """LoRA, since that is what the pipelines of SD 1.x and SDXL load; its up is zero but for the layer's number."""
    pipe = build()
    models = components(pipe)
    layers = [place for place in every_layer(models) if place[1] != "text_projection"]
    names = [naming(*place, models) for place in layers]
    assert resolve(names, models) == {name: whole(*place) for name, place in zip(names, layers, strict=True)}
    parts = ("lora_up", "lora_down") if naming is kohya_name else ("lora_B", "lora_A")
    file = {}
    for number, (name, (part, layer)) in enumerate(zip(names, layers, strict=True)):
        weight = models[part].get_submodule(layer).weight
        kernel = weight.shape[2:]
        file[f"{name}.{parts[0]}.weight"] = torch.full((weight.shape[0], 1, *(1 for _ in kernel)), float(number))
        file[f"{name}.{parts[1]}.weight"] = torch.ones(1, weight.shape[1], *kernel)
    save_file(file, tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    for number, (part, layer) in enumerate(layers):
        (up,) = models[part].get_submodule(layer).lora_B.values()
        assert up.weight.unique().tolist() == [float(number)], (part, layer)


@pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline])
def test_a_file_that_diffusers_wrote_is_found(tmp_path: Path, build: Callable[[], Any]) -> None:
    pipe = build()
    models = components(pipe)
    targets = ["to_q", "to_out.0", "q_proj", "out_proj", "fc1", "conv1", "proj_in"]
    layers: dict[str, Any] = {}
    for part, module in models.items():
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), module)
        state = {k.replace(".default", ""): v for k, v in module.state_dict().items() if ".lora_" in k}
        layers[f"{part}_lora_layers"] = state
    type(pipe).save_lora_weights(tmp_path, **layers)
    updates = foreign.read(opened(tmp_path)[""])
    found = resolve(updates, models)
    assert set(found.values()) == {
        whole(part, name) for part, name in every_layer_below_adapters(models) if name.endswith(tuple(targets))
    }


def every_layer_below_adapters(models: dict[str, nn.Module]) -> list[tuple[str, str]]:
    return [(part, name) for part, module in models.items() for name in layer_names(module)]


# Text encoders


def test_kohyas_names_of_clip_layers_are_the_same_for_every_version_of_transformers() -> None:
    """With transformers 5 the tiny pipelines' first encoder has no `text_model.`, and their second has."""
    name = "encoder.layers.0.self_attn.q_proj"
    pipe = tiny_sdxl_pipeline()
    models = components(pipe)
    mine = [next(n for n in layer_names(models[part]) if n.endswith(name)) for part in list(models)[1:]]
    kohya = "text_model_encoder_layers_0_self_attn_q_proj"
    assert kohya_name("text_encoder", mine[0], models) == f"lora_te1_{kohya}"
    assert kohya_name("text_encoder_2", mine[1], models) == f"lora_te2_{kohya}"
    sd = components(tiny_sd_pipeline())
    assert kohya_name("text_encoder", mine[0], sd) == f"lora_te_{kohya}"
    assert diffusers_name("text_encoder", mine[0], sd) == f"text_encoder.text_model.{name}"
    assert diffusers_name("text_encoder_2", "text_projection", models) == "text_encoder_2.text_projection"
    assert diffusers_name("", mine[0], {"": sd["text_encoder"]}) == f"text_encoder.text_model.{name}"
    for part, own in zip(("text_encoder", "text_encoder_2"), mine, strict=True):
        keys = [f"{part}.{name}", f"{part}.text_model.{name}", f"{part}.text_model.{name.replace('q_proj', 'to_q')}"]
        for key in (*keys, f"lora_te{'2' if part[-1] == '2' else ''}_{kohya}"):
            assert resolve([key], models) == {key: whole(part, own)}


def test_a_single_clip_model_is_a_text_encoder() -> None:
    model = architectures.build("sd15-text-encoder")
    layers = adaptable(model)
    assert len(layers) == 12 * 6
    assert resolve([kohya_name("", name, {"": model}) for name in layers], {"": model})
    assert kohya_name("", layers[0], {"": model}).startswith("lora_te_text_model_encoder_layers_0_self_attn_")


def test_t5_has_kohyas_third_prefix_even_as_the_second_encoder() -> None:
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)
    with torch.device("meta"):
        t5 = T5EncoderModel(config)
        clip = CLIPTextModelWithProjection(tiny_sdxl_pipeline().text_encoder_2.config)
    name = "encoder.block.0.layer.0.SelfAttention.q"
    flux = {"text_encoder": clip, "text_encoder_2": t5, "transformer": nn.Module()}
    key = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert kohya_name("text_encoder_2", name, flux) == key
    assert resolve([key], flux) == {key: whole("text_encoder_2", name)}
    assert kohya_name("text_encoder", "text_model.encoder.layers.0.mlp.fc1", flux).startswith("lora_te1_")
    assert kohya_name("text_encoder_3", name, {"text_encoder_3": t5}) == key
    assert diffusers_name("text_encoder_2", name, flux) == f"text_encoder_2.{name}"


# Other models


def flux() -> nn.Module:
    with torch.device("meta"):
        return FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )


@pytest.mark.parametrize("component", ["", "transformer"])
def test_a_transformers_layers_go_by_its_own_names(component: str) -> None:
    models = {component: flux()}
    for name in layer_names(models[component]):
        kohya, dotted = f"lora_transformer_{name}".replace(".", "_"), f"transformer.{name}"
        lycoris = f"lycoris_{name}".replace(".", "_")
        keys = [kohya, dotted, name, f"diffusion_model.{name}", lycoris]
        for key in keys:
            assert resolve([key], models) == {key: whole(component, name)}


def test_a_unet_without_attention_or_conditions_has_original_names_too() -> None:
    with torch.device("meta"):
        model = UNet2DModel(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
    for name in layer_names(model):
        assert resolve([f"lora_unet_{name}".replace(".", "_")], {"unet": model})
    assert original_unet_name(model, "up_blocks.0.upsamplers.0.conv") == "output_blocks.2.2.conv"
    assert original_unet_name(model, "down_blocks.1.resnets.0.conv1") == "input_blocks.4.0.in_layers.2"


def test_any_module_has_names() -> None:
    model = network()
    assert foreign_names("", model)["base_model.model.blocks.0.to_q"] == "blocks.0.to_q"
    assert resolve(["lycoris_blocks_1_to_out_0", "blocks.0.to_q", "norm"], {"": model}) == {
        "lycoris_blocks_1_to_out_0": whole("", "blocks.1.to_out.0"),
        "blocks.0.to_q": whole("", "blocks.0.to_q"),
        "norm": whole("", "norm"),
    }


def test_a_layer_by_itself_has_none() -> None:
    assert layer_names(nn.Linear(2, 2)) == []


# Adapters that are there already


def test_adapters_around_a_layer_change_no_name() -> None:
    pipe = tiny_sdxl_pipeline()
    models = components(pipe)
    before = {part: layer_names(module) for part, module in models.items()}
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]), adapter_name="lora")
    inject_krona(pipe, KronAConfig(a1=4, a2=8), "krona", text_encoders=True)
    assert {part: layer_names(module) for part, module in models.items()} == before
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    key = f"unet.{name}.base_layer"
    assert resolve([key], models) == {key: whole("unet", name)}


# What matches nothing, or too much


@pytest.mark.parametrize(
    ("key", "guess"),
    [
        ("lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q", "made for the UNet of Stable Diffusion XL"),
        ("unet.down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q", "made for the UNet of Stable Diffusion XL"),
        ("lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q", "made for the UNet of Stable Diffusion XL"),
        ("lora_unet_up_blocks_3_attentions_2_proj_in", r"made for the UNet of Stable Diffusion 1\.x or 2\.x"),
        ("lora_unet_input_blocks_2_1_proj_in", r"made for the UNet of Stable Diffusion 1\.x or 2\.x"),
        ("lora_unet_output_blocks_11_1_proj_in", r"made for the UNet of Stable Diffusion 1\.x or 2\.x"),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc1", "made for a pipeline with a second text encoder"),
        ("lora_te_text_model_encoder_layers_31_mlp_fc1", "made for a pipeline with a text encoder"),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", "made for a pipeline with a third text encoder"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "made for a transformer of FLUX' kind in its original layout"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "made for a transformer of FLUX' kind"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv", "made for Stable Diffusion 3"),
        ("transformer.transformer_blocks.11.attn.to_q", "made for a diffusion transformer"),
        ("unet.down_blocks.7.resnets.0.conv1", "made for a UNet"),
        ("something.else", r"for example something\.else\. Here there is unet \(UNet2DConditionModel\)"),
    ],
)
def test_what_matches_nothing_is_named_with_a_guess_what_it_is_for(key: str, guess: str) -> None:
    models = {"unet": tiny_unet()}
    good = [f"unet.{name}" for name in layer_names(models["unet"])[:2]]
    with pytest.raises(AdapterFileError, match=guess) as error:
        resolve([*good, key], models, "dog.safetensors")
    assert str(error.value).startswith(f"dog.safetensors: 1 of 3 layers match nothing here, for example {key}. ")


def test_the_most_telling_name_decides_the_guess_and_a_few_are_shown() -> None:
    keys = [f"lora_unet_input_blocks_{n}_0_in_layers_2" for n in range(20, 24)]
    with pytest.raises(
        AdapterFileError, match=r"5 of 5 .*_20_0_in_layers_2, .*_21_0.*, .*_22_0_in_layers_2, …\. .* second text"
    ):
        resolve([*keys, "lora_te2_text_model_encoder_layers_31_mlp_fc1"], {"unet": tiny_unet()})


def test_a_name_that_several_models_have_is_refused() -> None:
    key = "text_model.encoder.layers.0.mlp.fc1"
    with pytest.raises(
        AdapterFileError, match=r"could be text_encoder\.encoder.*fc1 and text_encoder_2\.text_model.*fc1;"
    ):
        resolve([key], components(tiny_sdxl_pipeline()))


def test_a_name_that_two_layers_of_a_model_share_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "a_b": nn.Linear(2, 2)})
    with pytest.raises(AdapterFileError, match=r"the layer lycoris_a_b could be a\.b and a_b"):
        resolve(["lycoris_a_b"], {"": model})


def test_one_layer_under_two_names_is_refused() -> None:
    models = {"unet": tiny_unet()}
    keys = ["unet.conv_in", "lora_unet_input_blocks_0_0"]
    with pytest.raises(AdapterFileError, match=r"unet\.conv_in and lora_unet_input_blocks_0_0 are the same layer"):
        resolve(keys, models)
