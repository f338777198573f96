"""The layouts of the families: what their tables reach, and what their signs claim."""

import re
from collections.abc import Iterator
from functools import cache

import diffusers
import pytest
from torch import nn

from diffusekrona.files.layouts.families import LAYOUTS, layout_of
from diffusekrona.files.layouts.layout import HalvesSwapped, Layout, Part, fused
from tests.files.layouts.originals import (
    EXAMPLES,
    FAMILIES,
    apart,
    dotted,
    keys,
    layer_names,
    originals,
    table_only,
    together,
    underscored,
    weights,
)
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline

SAME = {
    "flux": (),
    "chroma": (r"distilled_guidance_layer\.(in_proj|out_proj|norms\.\d+)",),
    "flux2": (),
    "sd3": (r"context_embedder",),
    "zimage": (
        r".*\.feed_forward\.w[123]",
        r".*\.(attention|ffn)_norm[12]",
        r"(layers|noise_refiner|siglip_refiner)\.\d+\.adaLN_modulation\.0",
        r"t_embedder\.mlp\.[02]",
        r"(cap|siglip)_embedder\.[01]",
    ),
    "qwen-image": (r".*",),
    "krea2": (),
    "hidream": (r".*",),
    "lumina2": (r"x_embedder", r".*\.ffn_norm[12]"),
    "pixart": (),
    "sana": (),
    "cosmos": (r"(crossattn_proj|img_context_proj)\.0",),
    "anima-text": (),
    "wan": (r"(pose_|vace_)?patch_embedding", r"face_encoder\.out_proj", r"fps_embedding"),
    "hunyuan-video": (r"clean_x_embedder\.proj(_[24]x)?", r"image_projection\.(up|down)"),
}
"""Layers that have Diffusers' names in the original as well."""

SHARED = {("flux", "hunyuan-video"): r"single_blocks[._]\d+[._]modulation[._]lin$"}
"""What ComfyUI renames to another family's names: (family that claims it, family that has it too) → names."""

UNTOLD = {"hunyuan-video": "its names are FLUX.1's, or those of HunyuanVideo 1.5 and HunyuanImage"}
"""Families that nothing tells in files of kohya's programs."""

DEEP = ("flux", "chroma", "flux2", "hunyuan-video")
"""Families that are told by the numbers of their blocks."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_table_reaches_every_layer_that_is_named_differently(name: str) -> None:
    example = EXAMPLES[name]
    model = example.build()
    reached = {part.module for _, parts in example.layout.parts(model) for part in parts}
    same = {layer for layer in layer_names(model) if any(re.fullmatch(part, layer) for part in SAME[example.family])}

    assert set(layer_names(model)) - reached - same == set()
    assert reached & same == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_of_use(family: str) -> None:
    models = [example.build() for example in EXAMPLES.values() if example.family == family]
    used = {(table, key) for model in models for table, key, found in keys(FAMILIES[family], model) if found}
    names = {layer for model in models for layer in layer_names(model)}

    assert [key for key in FAMILIES[family].table if ("table", key) not in used] == []
    assert [key for key in FAMILIES[family].also if ("also", key) not in used] == []
    assert [part for part in SAME[family] if not any(re.fullmatch(part, name) for name in names)] == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_original_is_taken_apart_to_what_it_is_put_together_from(name: str) -> None:
    example = EXAMPLES[name]
    model = example.build()
    tensors = {key.removesuffix(".weight"): value for key, value in weights(model).items() if key.endswith(".weight")}
    seen: list[str] = []
    for _, parts in originals(table_only(example.layout), model):
        for module, tensor in apart(parts, together(parts, tensors), model).items():
            assert tensor.equal(tensors[module]), module
            seen.append(module)

    assert len(seen) == len(set(seen))


def test_halves_are_swapped_but_in_blocks_with_what_tells_them() -> None:
    model = nn.ModuleDict({"0": nn.ModuleDict({"mod": nn.Linear(1, 4), "mlp": nn.Linear(1, 1)})})
    model["1"] = nn.ModuleDict({"mod": nn.Linear(1, 4)})
    layout = Layout("", "", (), {"blocks.{}.lin": HalvesSwapped("{}.mod", unless="{}.mlp")})

    assert dict(layout.parts(model)) == {
        "blocks.0.lin": (Part("0.mod"),),
        "blocks.1.lin": (Part("1.mod", (0, 2), (2, 4)), Part("1.mod", (2, 4), (0, 2))),
    }


def test_fused_modules_follow_each_other_with_as_many_rows_as_they_have() -> None:
    model = nn.ModuleDict({"0": nn.ModuleDict({"q": nn.Linear(1, 6), "k": nn.Linear(1, 2)})})
    layout = Layout("", "", (), {"blocks.{}.qk": fused("{}.", "q", "k"), "blocks.{}.qkv": fused("{}.", "q", "k", "v")})

    assert dict(layout.parts(model)) == {"blocks.0.qk": (Part("0.q", (0, 6)), Part("0.k", (6, 8)))}


def test_comfyui_gives_hunyuan_video_the_names_of_flux() -> None:
    hunyuan = {**FAMILIES["hunyuan-video"].table, **FAMILIES["hunyuan-video"].also}
    flux = {key: entry for key, entry in FAMILIES["flux"].table.items() if key not in ("img_in", "txt_in")}

    assert {key: hunyuan.get(key) for key in flux} == flux


def test_pixart_has_the_attention_of_sana() -> None:
    pixart, sana = (
        {key: entry for key, entry in FAMILIES[name].table.items() if "attn." in key} for name in ("pixart", "sana")
    )

    assert pixart == {key: sana[key] for key in pixart}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_models_layout_goes_by_its_class(name: str) -> None:
    model = EXAMPLES[name].build()
    derived = type("Derived", (type(model),), {})

    assert layout_of(model) is EXAMPLES[name].layout
    assert layout_of(derived.__new__(derived)) is EXAMPLES[name].layout


def test_other_models_have_no_layout() -> None:
    assert layout_of(tiny_sdxl_pipeline().unet) is None
    assert layout_of(nn.Linear(1, 1)) is None


def test_every_class_exists_and_is_of_one_family() -> None:
    kinds = [kind for layout in LAYOUTS for kind in layout.models]

    assert [kind for kind in kinds if not hasattr(diffusers, kind)] == []
    assert set(kinds) == {example.kind for example in EXAMPLES.values()}
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_sign_is_found_in_the_names_of_another_family(family: str) -> None:
    for other in FAMILIES:
        shared = SHARED.get((family, other))
        names = [name for name in _names(other) if not (shared and re.search(shared, name))]
        assert other == family or _found(FAMILIES[family], names) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_sign_is_found_in_the_names_of_other_models(family: str) -> None:
    sdxl, flux = tiny_sdxl_pipeline(), tiny_flux_pipeline()
    models = (sdxl.unet, sdxl.text_encoder, sdxl.text_encoder_2, flux.text_encoder_2)
    names = [name for model in models for own in layer_names(model) for name in (own, own.replace(".", "_"))]

    assert _found(FAMILIES[family], names) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sign_is_found_in_the_familys_own_names(family: str) -> None:
    layout = FAMILIES[family]

    assert [sign for sign in layout.signs if not any(re.search(sign, name) for name in _names(family))] == []
    assert _found(layout, [dotted(name) for name in _original_names(family)]) != []
    assert (_found(layout, [underscored(name) for name in _original_names(family)]) == []) == (family in UNTOLD)


def _found(layout: Layout, names: list[str]) -> list[str]:
    return [name for name in names if any(re.search(sign, name) for sign in layout.signs)]


@cache
def _names(family: str) -> list[str]:
    """What layers of the family's models may be called in files, original or Diffusers' own."""
    own = sorted(_original_names(family) | _own_names(family))
    return [name for layer in own for name in (dotted(layer), underscored(layer))]


@cache
def _original_names(family: str) -> set[str]:
    return {name for model in _models(family) for name, _ in originals(FAMILIES[family], model)}


@cache
def _own_names(family: str) -> set[str]:
    return {name for model in _models(family) for name in layer_names(model)}


def _models(family: str) -> Iterator[nn.Module]:
    for example in EXAMPLES.values():
        if example.family == family:
            yield example.build(shallow=family not in DEEP)
