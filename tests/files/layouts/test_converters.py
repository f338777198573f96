"""The layouts against Diffusers' converters: of checkpoints tensor by tensor, of adapters update by update."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as lora
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from diffusekrona.files.layouts.layout import outputs
from tests.files.layouts.originals import (
    EXAMPLES,
    FAMILIES,
    Original,
    apart,
    checkpoint,
    dotted,
    keys,
    originals,
    underscored,
    weights,
)

StateDict = dict[str, Tensor]

NO_CONVERTER = {
    "pixart": "Diffusers converts PixArt by a script of its repository only",
    "sana-sprint": "Diffusers converts Sana Sprint by a script of its repository only",
    "sana-video": "Diffusers converts videos' Sana by a script of its repository only",
    "skyreels": "Diffusers' converter is Wan's, and leaves what SkyReels adds as it is",
    "framepack": "it is published in Diffusers' layout",
    "anima-text": "Diffusers converts Anima by a script of its repository only",
}

EXTRAS: dict[str, tuple[str, ...]] = {
    "sd3": ("pos_embed",),
    "sd3.5-medium": ("pos_embed",),
    "sana": (
        "pos_embed",
        "y_embedder.y_embedding",
        "blocks.0.scale_shift_table",
        "blocks.1.scale_shift_table",
        "final_layer.scale_shift_table",
    ),
}
"""What converters take from a checkpoint that is no layer's."""


RANK = 2  # no third or quarter of it is whole, so no converter can take what is fused for block-diagonal
COLUMNS = 3

READ = {r"processor\.(qkv|proj)$": "the same layers by what foreign.parse leaves of their tensors' names"}
NORMS = {r"norm": "the converter leaves out the norms"}
IN_COMFYUI = r"_embedder\.(in|out)_layer|(time|guidance)_in\.(in|out)_layer|_attn\.|mlp\.[02]$|\.lin$|\.norm\."
SWAP = "the converter does not swap shift and scale, as the one for checkpoints does"


def peft(name: str, a: Tensor, b: Tensor) -> StateDict:
    return {f"{dotted(name)}.lora_A.weight": a, f"{dotted(name)}.lora_B.weight": b}


def kohya(name: str, a: Tensor, b: Tensor) -> StateDict:
    own = underscored(name)
    return {f"{own}.lora_down.weight": a, f"{own}.lora_up.weight": b, f"{own}.alpha": torch.tensor(float(len(a)))}


def xlabs(name: str, a: Tensor, b: Tensor) -> StateDict:
    return {f"{name}.down.weight": a, f"{name}.up.weight": b}


@dataclass(frozen=True)
class Case:
    """A converter of adapters.

    Attributes:
        example: a model's key in `EXAMPLES`.
        convert: the converter.
        write: (layer's name, A, B) → what a file holds for it.
        without: pattern of names that are left out → why.
    """

    example: str
    convert: Callable[[StateDict], StateDict]
    write: Callable[[str, Tensor, Tensor], StateDict]
    without: Mapping[str, str]

    def originals(self, model: nn.Module) -> list[Original]:
        every = originals(EXAMPLES[self.example].layout, model)
        return [(name, parts) for name, parts in every if not any(re.search(part, name) for part in self.without)]


CASES = {
    "flux-kohya": Case(
        "flux",
        lora._convert_kohya_flux_lora_to_diffusers,
        kohya,
        {**NORMS, "processor": "XLabs' names are for another converter"},
    ),
    "flux-xlabs": Case(
        "flux",
        lora._convert_xlabs_flux_lora_to_diffusers,
        xlabs,
        {
            r"^(?!.*processor)": "the converter knows XLabs' names only",
            **READ,
        },
    ),
    "chroma-kohya": Case(
        "chroma",
        lora._convert_kohya_flux_lora_to_diffusers,
        kohya,
        {**NORMS, "distilled_guidance_layer": "the converter is FLUX.1's"},
    ),
    "flux2": Case(
        "flux2",
        lora._convert_non_diffusers_flux2_lora_to_diffusers,
        peft,
        {**NORMS, r"final_layer\.adaLN": SWAP},
    ),
    "flux2-kohya": Case(
        "flux2",
        lora._convert_kohya_flux2_lora_to_diffusers,
        kohya,
        {**NORMS, r"guidance_in|modulation": "the converter leaves them out"},
    ),
    "zimage-kohya": Case(
        "zimage",
        lora._convert_non_diffusers_z_image_lora_to_diffusers,
        kohya,
        {
            **NORMS,
            r"siglip": "the converter has no name with it",
            r"x_embedder|final_layer": "the converter knows Diffusers' names of them only",
        },
    ),
    "qwen-image": Case("qwen-image", lora._convert_non_diffusers_qwen_lora_to_diffusers, peft, {}),
    "qwen-image-kohya": Case(
        "qwen-image",
        lora._convert_non_diffusers_qwen_lora_to_diffusers,
        kohya,
        {r"norm_(added_)?[qk]|txt_norm": "the converter leaves out the norms"},
    ),
    "krea2": Case(
        "krea2",
        lora._convert_non_diffusers_krea2_lora_to_diffusers,
        peft,
        {**NORMS, r"txtmlp\.0": "it is a norm"},
    ),
    "hidream": Case("hidream", lora._convert_non_diffusers_hidream_lora_to_diffusers, peft, {}),
    "lumina2": Case(
        "lumina2",
        lora._convert_non_diffusers_lumina2_lora_to_diffusers,
        peft,
        {**NORMS, r"embedder|final_layer": "the converter refuses what is in no block"},
    ),
    "cosmos": Case(
        "cosmos",
        lora._convert_non_diffusers_anima_lora_to_diffusers,
        peft,
        {r"attn\.[qk]_norm": "the converter leaves out the norms"},
    ),
    "anima-text": Case("anima-text", lora._convert_non_diffusers_anima_lora_to_diffusers, peft, {}),
    "wan": Case(
        "wan-image",
        lora._convert_non_diffusers_wan_lora_to_diffusers,
        peft,
        {
            **NORMS,
            r"img_emb\.proj\.[04]": "they are norms",
            r"patch_embedding": "the converter refuses it",
        },
    ),
    "wan-kohya": Case(
        "wan-image",
        lora._convert_musubi_wan_lora_to_diffusers,
        kohya,
        {**NORMS, r"^(?!blocks)": "the converter refuses what is in no block"},
    ),
    "hunyuan-video": Case(
        "hunyuan-video",
        lora._convert_hunyuan_video_lora_to_diffusers,
        peft,
        {
            r"final_layer\.adaLN": "the converter swaps the halves of A as well, and so the products are others",
            r"self_attn_qkv": "the converter divides A as it does B, and so the products are others",
            IN_COMFYUI: "the converter does not know ComfyUI's names",
        },
    ),
}

UNCONFIRMED = {
    "flux": READ,
    "pixart": {r"": NO_CONVERTER["pixart"]},
    "sana": {
        r"t_conv|x_embedder": NO_CONVERTER["sana-video"],
        r"[qk]_norm|^(t|cfg)_embedder": NO_CONVERTER["sana-sprint"],
    },
    "wan": {r"fps_projection": NO_CONVERTER["skyreels"]},
    "hunyuan-video": {IN_COMFYUI: "Diffusers does not know ComfyUI's names, which stand for the same as Tencent's"},
}
"""Family → pattern of keys that no converter in Diffusers has → why."""


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in NO_CONVERTER])
def test_a_checkpoint_in_the_original_layout_is_converted_to_the_models_own_tensors(name: str) -> None:
    example = EXAMPLES[name]
    model = example.build()
    tensors = weights(model)
    original = checkpoint(example, model, tensors) | {extra: torch.zeros(2, 2) for extra in EXTRAS.get(name, ())}
    convert = SINGLE_FILE_LOADABLE_CLASSES[example.kind]["checkpoint_mapping_fn"]

    converted: dict[str, Tensor] = convert(checkpoint=dict(original), config=model.config)

    assert converted.keys() - model.state_dict().keys() == set()
    assert tensors.keys() - converted.keys() == set()
    assert [key for key, tensor in tensors.items() if not torch.equal(tensor, converted[key])] == []


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_with_the_original_names_is_converted_to_the_same_updates(name: str) -> None:
    case = CASES[name]
    model = EXAMPLES[case.example].build()
    generator = torch.Generator().manual_seed(0)
    file: StateDict = {}
    expected: dict[str, Tensor] = {}
    for original, parts in case.originals(model):
        rows = sum(outputs(model.get_submodule(module)) for module in {part.module for part in parts})
        a, b = (torch.randn(*shape, generator=generator) for shape in ((RANK, COLUMNS), (rows, RANK)))
        file |= case.write(original, a, b)
        expected |= apart(parts, b @ a, model)

    converted = case.convert(file)

    assert _modules(converted) == sorted(expected)
    for module, update in expected.items():
        a, b = (_of(converted, module, factor) for factor in ("lora_A", "lora_B"))
        torch.testing.assert_close(b @ a, update, msg=lambda text, module=module: f"{module}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_no_more_is_left_out_than_is_there(name: str) -> None:
    case = CASES[name]
    names = [original for original, _ in originals(EXAMPLES[case.example].layout, EXAMPLES[case.example].build())]

    assert [part for part in case.without if not any(re.search(part, original) for original in names)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_all_keys_are_confirmed_by_a_converter_but_those_that_none_has(family: str) -> None:
    layout = FAMILIES[family]
    confirmed: set[tuple[str, str]] = set()
    for name, example in EXAMPLES.items():
        if example.layout is layout:
            model = example.build()
            in_adapters = [case.originals(model) for case in CASES.values() if case.example == name]
            held = {original for every in in_adapters for original, _ in every}
            for table, key, found in keys(layout, model):
                in_checkpoints = table == "table" and name not in NO_CONVERTER
                if found and (in_checkpoints or any(original in held for original, _ in found)):
                    confirmed.add((table, key))

    every = {(table, key) for table in ("table", "also") for key in getattr(layout, table)}
    unconfirmed = {key for _, key in every - confirmed}
    reasons = UNCONFIRMED.get(family, {})
    assert {key for key in unconfirmed if not any(re.search(part, key) for part in reasons)} == set()
    assert [part for part in reasons if not any(re.search(part, key) for key in unconfirmed)] == []


def _modules(converted: StateDict) -> list[str]:
    return sorted({_bare(key).rsplit(".lora_", 1)[0] for key in converted})


def _of(converted: StateDict, module: str, factor: str) -> Tensor:
    return next(tensor for key, tensor in converted.items() if _bare(key) == f"{module}.{factor}.weight")


def _bare(key: str) -> str:
    return key.removeprefix("transformer.").removeprefix("text_conditioner.")
