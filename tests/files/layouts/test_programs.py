"""How layers are called for other programs, against each program's own rules, written out here.

The rules were read in the programs' code: ComfyUI near 0.38.1 (comfy/lora.py 17358c8f, comfy/utils.py 09708eae),
sd-scripts 48d368fa of February 2026, musubi-tuner 30c658c4 of June 2026, SD.Next 058a7f0c of July 2026, InvokeAI
8e71a8a5 of August 2026. Diffusers' and LyCORIS' own code is run.
"""

import itertools
import re
from collections.abc import Mapping
from functools import cache

import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_anima_lora_to_diffusers,
    _convert_non_diffusers_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from lycoris.modules.lokr import LokrModule
from packaging.version import Version
from peft.tuners.lokr import LoKrLayer
from torch import Tensor, nn
from transformers import CLIPTextModel

from diffusekrona.bases import architectures
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.layouts.names import resolve
from diffusekrona.files.layouts.programs import (
    Program,
    diffusers_reads,
    layer_name,
    lycoris_reads,
    naming,
    original_layers,
    warnings_for,
)
from diffusekrona.kron.shapes import FactorShapes
from tests.files.layouts.originals import EXAMPLES
from tests.pipelines import tiny_flux_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline

ATTENTION = r"(.*\.)?(attn\d?|attention|self_attn|cross_attn)\..*"
UNETS = {"sd1": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}

# What the attention of a UNet is called in kohya's scripts, and all others read.
_IN_UNET = r"_transformer_blocks_\d+_attn[12]_(to_[qkv]|to_out_0)"
SD1 = rf"lora_unet_((down|up)_blocks_\d_attentions_\d|mid_block_attentions_0){_IN_UNET}"
SDXL = rf"lora_unet_((input|output)_blocks_\d_1|middle_block_1){_IN_UNET}"

# Attention in the programs' own models.
_SINGLES = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
_FLUX = r"double_blocks\.\d+\.(img|txt)_attn\.proj"
_FLUX2 = rf"{_FLUX}|single_blocks\.\d+\.linear[12]"
_SD3 = r"joint_blocks\.\d+\.(x|context)_block\.attn2?\.proj"
_WAN = r"blocks\.\d+\.(self|cross)_attn\.([qkvo]|[kv]_img)"
_COSMOS = r"blocks\.\d+\.(self|cross)_attn\.([qkv]_proj|output_proj)"
_ADAPTER = r"llm_adapter\.blocks\.\d+\.(self|cross)_attn\.[qkvo]_proj"
_KREA2 = r"(blocks|txtfusion\.(layerwise|refiner)_blocks)\.\d+\.attn\.(w[qkvo]|gate)"
_ZIMAGE = r"(layers|(noise|context)_refiner)\.\d+\.attention\."
_HIDREAM = r"(double|single)_stream_blocks\.\d+\.block\.attn1\.to_(q|k|v|out)(_t)?"


def _underscored(pattern: str) -> str:
    return pattern.replace(r"\.", "_")


def _native(pattern: str) -> str:
    return rf"diffusion_model\.({pattern})"


def _kohya(pattern: str) -> str:
    return rf"lora_unet_({_underscored(pattern)})"


ACCEPTED: Mapping[tuple[Program, str], str] = {
    # ComfyUI: "diffusion_model." and "lora_unet_" before the names of its own models; "transformer." before those that
    # flux_to_diffusers, mmdit_to_diffusers, z_image_to_diffusers and pixart_to_diffusers map.
    ("comfyui", "flux"): rf"{_native(_FLUX)}|transformer\.((single_)?{_SINGLES})",
    ("comfyui", "chroma"): rf"{_native(_FLUX)}|transformer\.((single_)?{_SINGLES})",
    ("comfyui", "flux2"): rf"{_native(_FLUX2)}|transformer\.({_SINGLES})",
    ("comfyui", "sd3"): rf"{_native(_SD3)}|transformer\.({_SINGLES})",
    ("comfyui", "sd3.5-medium"): rf"{_native(_SD3)}|transformer\.({_SINGLES.replace('attn', 'attn2?')})",
    ("comfyui", "zimage"): rf"{_native(_ZIMAGE + 'out')}|transformer\.{_ZIMAGE}to_[qkv]",
    ("comfyui", "pixart"): (
        _native(r"blocks\.\d+\.(attn\.proj|cross_attn\.(q_linear|proj))")
        + r"|transformer\.transformer_blocks\.\d+\.attn[12]\.to_[qkv]"
    ),
    ("comfyui", "qwen-image"): _native(_SINGLES),
    ("comfyui", "krea2"): _native(_KREA2),
    ("comfyui", "wan"): _native(_WAN),
    ("comfyui", "wan-image"): _native(_WAN),
    ("comfyui", "hidream"): _native(_HIDREAM),
    ("comfyui", "cosmos"): _native(_COSMOS),
    ("comfyui", "anima-text"): _native(_ADAPTER),
    # kohya: "lora_unet_" before the names of its models, which of Z-Image and FramePack are those of Diffusers.
    ("kohya", "zimage"): _kohya(_ZIMAGE + r"(to_[qkv]|to_out\.0)"),
    ("kohya", "qwen-image"): _kohya(_SINGLES),
    ("kohya", "krea2"): _kohya(_KREA2),
    ("kohya", "wan"): _kohya(_WAN),
    ("kohya", "wan-image"): _kohya(_WAN),
    ("kohya", "cosmos"): _kohya(_COSMOS),
    ("kohya", "anima-text"): _kohya(_ADAPTER),
    ("kohya", "framepack"): (
        r"lora_unet_((single_)?transformer_blocks_\d+|context_embedder_token_refiner_refiner_blocks_\d+)_attn_"
        r"(to_[qkv]|add_[qkv]_proj|to_out_0|to_add_out)"
    ),
    # SD.Next: "lora_transformer_" before Diffusers' names; of Krea 2 and Anima it has the original ones.
    ("sdnext", "flux"): rf"lora_transformer_(single_)?({_underscored(_SINGLES)})",
    ("sdnext", "chroma"): rf"lora_transformer_(single_)?({_underscored(_SINGLES)})",
    ("sdnext", "flux2"): (
        rf"lora_transformer_({_underscored(_SINGLES)}|single_transformer_blocks_\d+_attn_to_(qkv_mlp_proj|out))"
    ),
    ("sdnext", "sd3"): rf"lora_transformer_({_underscored(_SINGLES)})",
    ("sdnext", "zimage"): rf"lora_transformer_({_underscored(_ZIMAGE)}(to_[qkv]|to_out_0))",
    ("sdnext", "krea2"): _kohya(_KREA2),
    ("sdnext", "cosmos"): _kohya(_COSMOS),
    ("sdnext", "anima-text"): _native(_ADAPTER),
    # InvokeAI: of FLUX.1 what OneTrainer writes; of Qwen-Image, Wan and Anima what kohya's scripts do.
    ("invokeai", "flux"): (
        r"lora_transformer_(single_transformer_blocks|transformer_blocks)_\d+_"
        r"attn_(to_[qkv]|add_[qkv]_proj|to_out_0|to_add_out)"
    ),
    ("invokeai", "qwen-image"): _kohya(_SINGLES),
    ("invokeai", "wan"): r"lora_unet_blocks_\d+_(self|cross)_attn_[qkvo]",
    ("invokeai", "cosmos"): _kohya(_COSMOS),
    ("invokeai", "anima-text"): _kohya(_ADAPTER),
}

SIGLIP = r"siglip_refiner\..*"
"""Of Z-Image's variant for editing, which no program maps."""


@cache
def model(example: str) -> nn.Module:
    return EXAMPLES[example].build()


def linear(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


def attention(module: nn.Module, but: str = SIGLIP) -> list[str]:
    """Names of the linear layers of all attention."""
    return [name for name in linear(module) if re.fullmatch(ATTENTION, name) and not re.fullmatch(but, name)]


def named(program: Program, module: nn.Module, layers: list[str], component: str = "transformer") -> dict[str, str]:
    """Layer → its name in a file for the program."""
    rule = naming(program, component, module, {component: module})
    originals = original_layers(module, layers)
    return {name: layer_name(rule, name, originals.get(name)) for name in layers}


@pytest.mark.parametrize(("program", "example"), ACCEPTED)
def test_all_attention_has_names_that_the_program_accepts(program: Program, example: str) -> None:
    layers = attention(model(example))
    names = named(program, model(example), layers)
    assert len(layers) > 3
    assert not [name for name in names.values() if not re.fullmatch(ACCEPTED[program, example], name)]
    assert len(set(names.values())) == len(layers)


@pytest.mark.parametrize("program", ["comfyui", "kohya", "sdnext", "invokeai", "lora"])
@pytest.mark.parametrize(("unet", "accepted"), [("sd1", SD1), ("sdxl", SDXL)])
def test_all_attention_of_unets_has_names_that_every_program_accepts(
    program: Program, unet: str, accepted: str
) -> None:
    module = UNETS[unet]().unet
    names = named(program, module, attention(module), "unet").values()
    assert names
    assert not [name for name in names if not re.fullmatch(accepted, name)]


@pytest.mark.parametrize(("program", "example"), [key for key in ACCEPTED if key[1] != "framepack"])
def test_names_are_read_back_as_the_same_layers(program: Program, example: str) -> None:
    module = model(example)
    names = named(program, module, attention(module))
    found = resolve(names.values(), {"transformer": module})
    assert {own: found[name].parts[0].module for own, name in names.items()} == {own: own for own in names}


_BLOCK = "transformer_blocks.0."
NAMES: list[tuple[Program, str, str, str]] = [
    # One layer in both.
    ("comfyui", "flux", f"{_BLOCK}attn.to_out.0", "diffusion_model.double_blocks.0.img_attn.proj"),
    ("comfyui", "flux", f"{_BLOCK}ff_context.net.2", "diffusion_model.double_blocks.0.txt_mlp.2"),
    ("comfyui", "flux", "single_transformer_blocks.1.proj_out", "diffusion_model.single_blocks.1.linear2"),
    # A part of one, which ComfyUI maps: rows of qkv, rows of linear1, rows the other way round.
    ("comfyui", "flux", f"{_BLOCK}attn.add_k_proj", f"transformer.{_BLOCK}attn.add_k_proj"),
    (
        "comfyui",
        "flux",
        "single_transformer_blocks.1.proj_mlp",
        "transformer.single_transformer_blocks.1.proj_mlp",
    ),
    ("comfyui", "flux", "norm_out.linear", "transformer.norm_out.linear"),
    # Layers that its maps do not have, but its model.
    (
        "comfyui",
        "chroma",
        "distilled_guidance_layer.layers.0.linear_2",
        "diffusion_model.distilled_guidance_layer.layers.0.out_layer",
    ),
    ("comfyui", "flux2", "single_stream_modulation.linear", "diffusion_model.single_stream_modulation.lin"),
    (
        "comfyui",
        "flux2",
        "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
        "diffusion_model.single_blocks.1.linear1",
    ),
    ("comfyui", "sd3", f"{_BLOCK}attn.to_q", f"transformer.{_BLOCK}attn.to_q"),
    ("comfyui", "sd3", f"{_BLOCK}ff.net.0.proj", "diffusion_model.joint_blocks.0.x_block.mlp.fc1"),
    ("comfyui", "zimage", "layers.1.attention.to_v", "transformer.layers.1.attention.to_v"),
    ("comfyui", "zimage", "layers.1.attention.to_out.0", "diffusion_model.layers.1.attention.out"),
    ("comfyui", "zimage", "layers.1.feed_forward.w3", "diffusion_model.layers.1.feed_forward.w3"),
    ("comfyui", "pixart", f"{_BLOCK}attn2.to_q", "diffusion_model.blocks.0.cross_attn.q_linear"),
    ("comfyui", "pixart", f"{_BLOCK}attn2.to_k", f"transformer.{_BLOCK}attn2.to_k"),
    ("comfyui", "qwen-image", f"{_BLOCK}img_mod.1", f"diffusion_model.{_BLOCK}img_mod.1"),
    ("comfyui", "krea2", f"{_BLOCK}attn.to_gate", "diffusion_model.blocks.0.attn.gate"),
    ("comfyui", "wan-image", "blocks.1.attn2.add_v_proj", "diffusion_model.blocks.1.cross_attn.v_img"),
    ("comfyui", "wan", "blocks.1.ffn.net.0.proj", "diffusion_model.blocks.1.ffn.0"),
    ("comfyui", "cosmos", f"{_BLOCK}attn2.to_out.0", "diffusion_model.blocks.0.cross_attn.output_proj"),
    ("comfyui", "anima-text", "blocks.0.mlp.0", "diffusion_model.llm_adapter.blocks.0.mlp.0"),
    ("comfyui", "hunyuan-video", f"{_BLOCK}attn.to_out.0", "diffusion_model.double_blocks.0.img_attn_proj"),
    ("comfyui", "lumina2", "layers.1.attn.to_out.0", "diffusion_model.layers.1.attention.out"),
    ("kohya", "flux", f"{_BLOCK}attn.to_add_out", "lora_unet_double_blocks_0_txt_attn_proj"),
    ("kohya", "sd3", f"{_BLOCK}attn.to_add_out", "lora_unet_joint_blocks_0_context_block_attn_proj"),
    ("kohya", "flux2", "single_transformer_blocks.0.attn.to_out", "lora_unet_single_blocks_0_linear2"),
    ("kohya", "hunyuan-video", f"{_BLOCK}ff.net.2", "lora_unet_double_blocks_0_img_mlp_fc2"),
    ("sdnext", "anima-text", "blocks.0.self_attn.q_proj", "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj"),
    ("invokeai", "flux2", "single_transformer_blocks.1.attn.to_out", "diffusion_model.single_blocks.1.linear2"),
    ("diffusers", "zimage", "layers.1.attention.to_out.0", "transformer.layers.1.attention.to_out.0"),
    ("lora", "flux", f"{_BLOCK}attn.to_q", f"transformer.{_BLOCK}attn.to_q"),
    ("lora", "wan", "blocks.1.attn1.to_q", "diffusion_model.blocks.1.self_attn.q"),
]


@pytest.mark.parametrize(("program", "example", "own", "name"), NAMES)
def test_names(program: Program, example: str, own: str, name: str) -> None:
    assert named(program, model(example), [own]) == {own: name}


@pytest.mark.parametrize("program", ["kohya", "invokeai"])
def test_a_part_of_a_larger_layer_has_no_name_in_some_programs(program: Program) -> None:
    with pytest.raises(AdapterFileError, match=r"attn\.to_q is a part of a larger one there.*LoRA"):
        named(program, model("flux2"), ["transformer_blocks.0.attn.to_q"])


@pytest.mark.parametrize(
    ("program", "example", "reason"),
    [
        ("comfyui", "sana", "none of this kind of model; merge"),
        ("comfyui", "framepack", "none of this kind of model; merge"),
        ("kohya", "hidream", "none of this kind of model; merge"),
        ("kohya", "pixart", "none of this kind of model; merge"),
        ("sdnext", "qwen-image", "Diffusers, whose pipelines refuse LoKr; write it as a LoRA"),
        ("sdnext", "wan", "Diffusers, whose pipelines refuse LoKr; write it as a LoRA"),
        ("invokeai", "sd3", "none of this kind of model; merge"),
        ("invokeai", "chroma", "none of this kind of model; merge"),
        ("invokeai", "zimage", "LoRA only; write it as a LoRA"),
        ("invokeai", "krea2", "LoRA only; write it as a LoRA"),
    ],
)
def test_what_a_program_does_not_read_is_refused_with_what_to_do(program: Program, example: str, reason: str) -> None:
    with pytest.raises(AdapterFileError, match=reason):
        naming(program, "transformer", model(example), {})


@pytest.mark.parametrize("example", EXAMPLES)
def test_diffusers_has_its_own_names_and_no_alpha(example: str) -> None:
    module = model(example)
    rule = naming("diffusers", "transformer_2", module, {"transformer_2": module})
    assert (rule.original, rule.alpha, rule.prefix) == (False, False, "transformer_2.")


def test_unknown_models_keep_the_names_of_diffusers() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert named("comfyui", module, ["0"]) == {"0": "lora_transformer_0"}
    assert named("comfyui", module, ["0"], "unet") == {"0": "lora_unet_0"}
    assert named("diffusers", module, ["0"], "unet") == {"0": "unet.0"}
    assert "not known whether ComfyUI" in warnings_for("comfyui", "unet", module, ["lora_unet_0"])[0]
    with pytest.raises(AdapterFileError, match="none of this kind"):
        naming("invokeai", "unet", module, {})


class TestTextEncoders:
    LAYER = "encoder.layers.1.self_attn.q_proj"

    def name(self, program: Program, component: str, pipe: object) -> str:
        components = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}  # type: ignore[attr-defined]
        module = components[component]
        own = next(name for name in linear(module) if name.endswith(self.LAYER) or name.endswith("SelfAttention.q"))
        rule = naming(program, component, module, components)
        return layer_name(rule, own, original_layers(module, [own])[own])

    @pytest.mark.parametrize("program", ["comfyui", "kohya", "sdnext", "invokeai", "lora"])
    def test_clip_is_numbered_where_there_are_several(self, program: Program) -> None:
        layer = "text_model_encoder_layers_1_self_attn_q_proj"
        assert self.name(program, "text_encoder", tiny_sd_pipeline()) == f"lora_te_{layer}"
        assert self.name(program, "text_encoder", tiny_sdxl_pipeline()) == f"lora_te1_{layer}"
        assert self.name(program, "text_encoder_2", tiny_sdxl_pipeline()) == f"lora_te2_{layer}"

    def test_diffusers_wants_the_name_with_text_model(self) -> None:
        name = self.name("diffusers", "text_encoder_2", tiny_sdxl_pipeline())
        assert name == f"text_encoder_2.text_model.{self.LAYER}"

    def test_a_lora_beside_a_transformer_is_all_in_diffusers_names(self) -> None:
        # Diffusers takes any .lora_down.weight in a file of FLUX.1 for kohya's, and then leaves out the text encoder.
        name = self.name("lora", "text_encoder", tiny_flux_pipeline())
        assert name == f"text_encoder.text_model.{self.LAYER}"

    @pytest.mark.parametrize(("program", "number"), [("comfyui", 3), ("kohya", 3), ("sdnext", 2), ("invokeai", 2)])
    def test_t5_of_flux(self, program: Program, number: int) -> None:
        name = self.name(program, "text_encoder_2", tiny_flux_pipeline())
        assert re.fullmatch(rf"lora_te{number}_encoder_block_\d_layer_0_SelfAttention_q", name)


models_read_lokr = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42"), reason="models of Diffusers read LoKr files since 0.42"
)


class TestDiffusersOwnCode:
    def weights(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        return {f"{name}.{half}.weight": torch.zeros(1, 1) for name in names.values() for half in ("lora_A", "lora_B")}

    def layers(self, tensors: Mapping[str, Tensor], prefix: str) -> set[str]:
        return {key.removeprefix(prefix).rsplit(".", 2)[0] for key in tensors}

    @pytest.mark.parametrize("example", ["wan", "wan-image"])
    def test_loras_of_wan(self, example: str) -> None:
        names = named("lora", model(example), attention(model(example)))
        found = _convert_non_diffusers_wan_lora_to_diffusers(self.weights(names))
        assert self.layers(found, "transformer.") == set(names)

    def test_loras_of_anima(self) -> None:
        components = {"transformer": model("cosmos"), "text_conditioner": model("anima-text")}
        for part, module in components.items():
            rule = naming("lora", part, module, components)
            originals = original_layers(module, attention(module))
            names = {own: layer_name(rule, own, originals[own]) for own in originals}
            found = _convert_non_diffusers_anima_lora_to_diffusers(self.weights(names))
            assert self.layers(found, f"{part}.") == set(names)

    @pytest.mark.parametrize("architecture", ["sdxl", "sd15"])
    def test_loras_of_unets(self, architecture: str) -> None:
        module = architectures.build(architecture)
        layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        file = {
            f"{name}.lora_{part}.weight": torch.tensor(layers.index(own))
            for own, name in named("lora", module, layers, "unet").items()
            for part in ("up", "down")
        }
        mapped, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(file, module.config))
        found = {key: layers[int(index)] for key, index in convert_unet_state_dict_to_peft(mapped).items()}
        assert found == {f"unet.{name}.lora_{part}.weight": name for name in layers for part in "AB"}

    @pytest.mark.parametrize(("kind", "loader"), [("flux2", "Flux2"), ("zimage", "ZImage")])
    def test_pipelines_that_read_lokr_take_our_names_without_alpha(self, kind: str, loader: str) -> None:
        mixin = getattr(diffusers.loaders, f"{loader}LoraLoaderMixin")
        names = named("diffusers", model(kind), attention(model(kind)))
        tensors = {f"{name}.lokr_{w}": torch.zeros(1, 1) for name in names.values() for w in ("w1", "w2")}
        assert mixin.lora_state_dict(dict(tensors)) == tensors

    @pytest.mark.parametrize("loader", ["QwenImage", "Wan", "SD3", "HiDreamImage", "Lumina2", "Sana", "HunyuanVideo"])
    def test_other_pipelines_refuse_lokr(self, loader: str) -> None:
        mixin = getattr(diffusers.loaders, f"{loader}LoraLoaderMixin")()
        mixin.transformer = model("wan")
        tensors = {f"transformer.transformer_blocks.0.attn.to_q.lokr_{w}": torch.zeros(1, 1) for w in ("w1", "w2")}
        with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
            mixin.load_lora_weights(tensors)

    @models_read_lokr
    @pytest.mark.parametrize("splits", [{(2, 2)}, {(4, 4)}, {(2, 4)}, {(4, 2)}, {(2, 2), (4, 4)}, {(8, 8)}, {(16, 2)}])
    @pytest.mark.parametrize("part", ["transformer", "unet"])
    def test_a_model_finds_the_shapes_that_one_number_tells(self, part: str, splits: set[tuple[int, int]]) -> None:
        module = getattr(tiny_flux_pipeline() if part == "transformer" else tiny_sd_pipeline(), part)
        layers = [name for name in attention(module) if name.endswith("to_q")][: len(splits)]
        tensors, factors = {}, {}
        for (own, name), (a1, a2) in zip(named("diffusers", module, layers, part).items(), sorted(splits), strict=True):
            d, h = module.get_submodule(own).weight.shape
            factors[name] = FactorShapes(a1, a2, d // a1, h // a2)
            tensors[f"{name}.lokr_w1"] = torch.zeros(a1, a2)
            tensors[f"{name}.lokr_w2"] = torch.zeros(d // a1, h // a2)
        texts = warnings_for("diffusers", part, module, list(factors), factors=factors)
        if diffusers_reads(factors.values()):
            module.load_lora_adapter(tensors, prefix=part)
            assert not texts
            assert sum(isinstance(layer, LoKrLayer) for layer in module.modules()) == len(layers)
        else:
            with pytest.raises(ValueError, match="Could not infer a `decompose_factor`"):
                module.load_lora_adapter(tensors, prefix=part)
            assert "one number in all layers" in texts[0]

    @models_read_lokr
    def test_a_unet_takes_no_convolutions(self) -> None:
        module = tiny_sd_pipeline().unet
        d, h, *kernel = module.conv_in.weight.shape
        tensors = {
            "unet.conv_in.lokr_w1": torch.zeros(2, 2),
            "unet.conv_in.lokr_w2": torch.zeros(d // 2, h // 2, *kernel),
        }
        with pytest.raises(ValueError, match="too many values to unpack"):
            module.load_lora_adapter(tensors, prefix="unet")


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


@pytest.mark.parametrize(("d", "h"), [(16, 16), (24, 16), (36, 24), (7, 12), (32, 8)])
def test_lycoris_own_loader_takes_what_one_number_splits(d: int, h: int) -> None:
    layer = nn.Linear(h, d)
    taken = {}
    for a1, a2 in itertools.product(_divisors(d), _divisors(h)):
        w1, w2 = torch.zeros(a1, a2), torch.zeros(d // a1, h // a2)
        try:
            with torch.no_grad():
                LokrModule.make_module_from_state_dict(
                    "layer", layer, w1, None, None, w2, None, None, None, None, torch.tensor(1.0), None
                )
            taken[a1, a2] = True
        except RuntimeError:  # shapes that do not match
            taken[a1, a2] = False
    assert taken == {(a1, a2): lycoris_reads(FactorShapes(a1, a2, d // a1, h // a2)) for a1, a2 in taken}
    assert True in taken.values()
    assert False in taken.values()


class TestWarnings:
    def test_kohyas_scripts_refuse_factors_that_lycoris_does(self) -> None:
        shapes = {"wide": FactorShapes(4, 64, 80, 5), "square": FactorShapes(4, 4, 80, 80)}
        (text,) = warnings_for("kohya", "unet", tiny_sd_pipeline().unet, list(shapes), factors=shapes)
        assert "1 of 2 layers, for example wide" in text

    def test_invokeai_refuses_some_layers_of_flux(self) -> None:
        # Its parsing of "ff_context" ends at "ff", and of "norm1_context" at "norm1"; outside the blocks it has none.
        module = model("flux")
        names = [f"lora_transformer_{name.replace('.', '_')}" for name in linear(module)]
        (text,) = warnings_for("invokeai", "transformer", module, names)
        refused = [n for n in linear(module) if "_context" in n or not re.match(r"(single_)?transformer_blocks", n)]
        assert f"{len(refused)} of {len(names)} layers" in text
        assert "FLUX.1" in text
        assert "LoRA, of which it refuses norm_out" in text
        assert not warnings_for(
            "invokeai", "transformer", module, list(named("invokeai", module, attention(module)).values())
        )

    def test_invokeai_needs_queries_keys_and_values_of_flux(self) -> None:
        block = "lora_transformer_transformer_blocks_0_attn_"
        names = [f"{block}to_q", f"{block}to_v", f"{block}add_q_proj", f"{block}add_k_proj", f"{block}add_v_proj"]
        (text,) = warnings_for("invokeai", "transformer", model("flux"), names)
        assert f"as of {block}to_q, {block}to_v." in text

    def test_invokeai_recognizes_no_products(self) -> None:
        module = tiny_sd_pipeline().unet
        names = list(named("invokeai", module, attention(module), "unet").values())
        assert not warnings_for("invokeai", "unet", module, names)
        (text,) = warnings_for("invokeai", "unet", module, names, names)
        assert "b_rank None" in text
        (text,) = warnings_for("invokeai", "unet", module, [name for name in names if "attn1" in name])
        assert "by attn2's to_k and to_v" in text

    @pytest.mark.parametrize(
        ("example", "read", "left"),
        [
            ("qwen-image", "transformer_blocks.0.img_mod.1", "proj_out"),
            ("wan-image", "blocks.0.ffn.net.2", "blocks.0.attn2.add_k_proj"),
        ],
    )
    def test_invokeai_leaves_out_what_is_not_in_its_lists(self, example: str, read: str, left: str) -> None:
        names = named("invokeai", model(example), [read, left])
        (text,) = warnings_for("invokeai", "transformer", model(example), list(names.values()))
        assert f"1 of 2 layers, for example {names[left]}" in text

    def test_comfyui_does_not_find_some_embeddings_of_hunyuan_video(self) -> None:
        module = model("hunyuan-video")
        layers = ["time_text_embed.timestep_embedder.linear_1", "transformer_blocks.0.attn.to_out.0"]
        names = named("comfyui", module, layers)
        (text,) = warnings_for("comfyui", "transformer", module, list(names.values()))
        assert f"for example {names[layers[0]]}" in text

    def test_cosmos_is_no_anima(self) -> None:
        module, names = model("cosmos"), ["lora_unet_x"]
        assert "has no Cosmos" in warnings_for("invokeai", "transformer", module, names)[0]
        anima = {"transformer": module, "text_conditioner": model("anima-text")}
        assert not warnings_for("invokeai", "transformer", module, names, components=anima)

    def test_invokeai_tells_flux2_by_the_width_of_some_layers(self) -> None:
        module = model("flux2")  # [dev], which is wider than FLUX.1
        layers = ["single_transformer_blocks.0.attn.to_out", "transformer_blocks.0.attn.to_out.0"]
        names = list(named("invokeai", module, layers).values())
        assert not warnings_for("invokeai", "transformer", module, names)
        assert "by img_attn.proj in any block" in warnings_for("invokeai", "transformer", module, names[:1])[0]
        assert "one of FLUX.1" in warnings_for("invokeai", "transformer", module, names, names)[0]
        with torch.device("meta"):
            klein = diffusers.Flux2Transformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=24)
        assert "by img_mlp.0 in any block" in warnings_for("invokeai", "transformer", klein, names)[0]

    def test_diffusers_reads_no_lokr_of_text_encoders(self) -> None:
        encoder = tiny_sd_pipeline().text_encoder
        assert isinstance(encoder, CLIPTextModel)
        assert "`load_krona` does" in warnings_for("diffusers", "text_encoder", encoder, ["x"])[0]
