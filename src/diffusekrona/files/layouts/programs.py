"""How the layers of a model are to be called in a file so that a given program reads it.

Read from the programs' own code: ComfyUI near 0.38.1 (comfy/lora.py of commit 17358c8f, comfy/utils.py of 09708eae),
kohya's sd-scripts (February 2026) and musubi-tuner (June 2026), SD.Next (July 2026), InvokeAI 6.14.0 alpha (August
2026) and Diffusers 0.42.1. `docs/programs.md` says what of it was tried.

ComfyUI has every layer of every model by its name in the original checkpoint. Where Diffusers has several layers for
one of these, a Kronecker product for one of them is none for the whole, so that only its name in Diffusers will do,
and not every program has that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ...errors import AdapterFileError
from ...kron.shapes import FactorShapes
from ...tuner.projections import FUSED_PROJECTIONS
from ..unused import few
from .families import layout_of
from .layout import Part
from .names import with_text_model
from .unet import is_sdxl_unet, is_unet, original_names

Program = Literal["comfyui", "kohya", "diffusers", "sdnext", "invokeai", "lora"]
"""Whom a file is for; "lora" is a LoRA, named as most programs read it."""

TITLES: dict[Program, str] = {
    "comfyui": "ComfyUI",
    "kohya": "kohya's scripts",
    "diffusers": "Diffusers",
    "sdnext": "SD.Next",
    "invokeai": "InvokeAI",
    "lora": "LoRA",
}

Tensors = Literal["lokr", "lora_A/lora_B", "lora_down/lora_up"]
"""What a layer's tensors are called: `.lokr_w1` and so on; `.lora_A.weight` and `.lora_B.weight`; or
`.lora_down.weight` and `.lora_up.weight`."""


class Spelling(NamedTuple):
    """How a name is written: what comes before it, and what stands between its parts."""

    prefix: str
    separator: Literal[".", "_"]


@dataclass(frozen=True)
class Naming:
    """How a program names the layers of one model.

    Attributes:
        prefix: what comes before a layer's name, such as "lora_unet_", "diffusion_model." or "transformer.".
        separator: what stands between the parts of the name.
        original: whether the name is the one that `original_layers` tells, otherwise it is Diffusers'.
        single: with `original`, how the program spells Diffusers' name of a layer that is only a part of one in the
            original, where it finds that part by itself; None where it has no name for it.
        alpha: whether `.alpha` tensors are written. Diffusers' pipelines take them for unknown ones.
        tensors: what a layer's tensors are called.
    """

    prefix: str
    separator: Literal[".", "_"]
    original: bool = False
    single: Spelling | None = None
    alpha: bool = True
    tensors: Tensors = "lokr"


_KOHYA_DIFFUSERS = Naming("lora_unet_", "_")
_KOHYA = Naming("lora_unet_", "_", original=True)
_NATIVE = Naming("diffusion_model.", ".", original=True)
_NATIVE_OR_SINGLE = replace(_NATIVE, single=Spelling("transformer.", "."))
_ONETRAINER = Naming("lora_transformer_", "_")
_PEFT = Naming("transformer.", ".", alpha=False)

_AS_LORA = "write it as a LoRA"
_BY_DIFFUSERS = f"it leaves this kind of model to Diffusers, whose pipelines refuse LoKr; {_AS_LORA}"
_LORA_ONLY = f"of this kind of model it reads LoRA only; {_AS_LORA}"
_NO_SUCH_MODEL = "it reads none of this kind of model; merge it into the weights"

_NAMINGS: dict[Program, dict[str, Naming | str]] = {
    "comfyui": {
        "unet": _KOHYA_DIFFUSERS,
        "sdxl": _KOHYA,
        **dict.fromkeys(("sd3", "flux", "chroma", "flux2", "zimage", "krea2", "pixart"), _NATIVE_OR_SINGLE),
        **dict.fromkeys(("qwen-image", "wan", "hidream", "lumina2", "hunyuan-video"), _NATIVE),
        **dict.fromkeys(("cosmos", "anima", "anima-text"), _NATIVE),
    },
    "kohya": {
        "unet": _KOHYA_DIFFUSERS,
        **dict.fromkeys(("sdxl", "sd3", "flux", "chroma", "flux2", "lumina2", "hunyuan-video"), _KOHYA),
        **dict.fromkeys(("wan", "qwen-image", "krea2", "cosmos", "anima", "anima-text"), _KOHYA),
        # musubi-tuner has these two models with the layers of Diffusers.
        **dict.fromkeys(("zimage", "framepack"), _KOHYA_DIFFUSERS),
    },
    "diffusers": {
        **dict.fromkeys(("unet", "sdxl", "sd3", "flux", "chroma", "flux2", "zimage", "qwen-image", "krea2"), _PEFT),
        **dict.fromkeys(("wan", "hidream", "lumina2", "pixart", "sana", "hunyuan-video", "framepack"), _PEFT),
        **dict.fromkeys(("cosmos", "anima", "anima-text"), _PEFT),
    },
    "sdnext": {
        "unet": _KOHYA_DIFFUSERS,
        **dict.fromkeys(("sdxl", "krea2", "cosmos", "anima"), _KOHYA),
        **dict.fromkeys(("sd3", "flux", "chroma", "flux2", "zimage"), _ONETRAINER),
        "anima-text": _NATIVE,
        **dict.fromkeys(("qwen-image", "wan", "hidream", "lumina2", "sana", "hunyuan-video"), _BY_DIFFUSERS),
    },
    "invokeai": {
        "unet": _KOHYA_DIFFUSERS,
        **dict.fromkeys(("sdxl", "qwen-image", "wan", "cosmos", "anima", "anima-text"), _KOHYA),
        "flux": _ONETRAINER,
        "flux2": _NATIVE,
        **dict.fromkeys(("zimage", "krea2"), _LORA_ONLY),
    },
    "lora": {
        "unet": replace(_KOHYA_DIFFUSERS, tensors="lora_down/lora_up"),
        "sdxl": replace(_KOHYA, tensors="lora_down/lora_up"),
        **dict.fromkeys(
            ("sd3", "flux", "chroma", "flux2", "zimage", "qwen-image", "krea2", "hidream", "pixart", "sana"),
            replace(_PEFT, tensors="lora_A/lora_B"),
        ),
        # ComfyUI has no such names for these, but Diffusers does not read the original ones.
        **dict.fromkeys(("lumina2", "cosmos", "hunyuan-video", "framepack"), replace(_PEFT, tensors="lora_A/lora_B")),
        # Both read the original names of these.
        **dict.fromkeys(("wan", "anima", "anima-text"), replace(_NATIVE, alpha=False, tensors="lora_A/lora_B")),
    },
}
"""Program → family → how it names the layers, or why it reads none."""

_ANY_MODEL: dict[Program, Naming] = {
    "comfyui": _ONETRAINER,
    "kohya": _ONETRAINER,
    "diffusers": _PEFT,
    "lora": replace(_PEFT, tensors="lora_A/lora_B"),
}
"""Program → the name of layers of which no original checkpoint is known here."""

_ENCODERS = ("clip", "t5", "llm")
_UNKNOWN = "unknown"
_NO_SUCH_ENCODER = "it reads none of this text encoder; leave it out, or merge it into the weights"


class _Limit(NamedTuple):
    """What a program does not do with some layers of a family.

    Attributes:
        layers: what is found in the file's names for them.
        text: what is done with them; their number and some of their names follow.
        products: whether only those are meant whose larger factor is a product.
    """

    program: Program
    families: tuple[str, ...]
    layers: str
    text: str
    products: bool = False


_WIDTH_OF_FLUX1 = 3072  # and of FLUX.2 [klein] 4B

_LIMITS = (
    _Limit(
        "comfyui",
        ("hunyuan-video",),
        r"(time|guidance)_in\.mlp|txt_in\.[tc]_embedder",
        "ComfyUI does not find the embeddings of time and text, and leaves them as they are",
    ),
    _Limit(
        "invokeai",
        ("flux",),
        r"_ff_context_|_norm1_context_|^lora_transformer_(?!(single_)?transformer_blocks_)",
        "InvokeAI refuses a file of FLUX.1 with such layers; leave them out, or write the adapter as a LoRA, of which "
        "it refuses norm_out and guidance_embedder only",
    ),
    _Limit(
        "invokeai",
        ("unet", "clip"),
        r"attn2_to_[kv]$|self_attn",
        "InvokeAI does not recognize a file whose larger factors are products; write them whole (b_rank None)",
        products=True,
    ),
    _Limit(
        "invokeai",
        ("flux2",),
        "",
        "InvokeAI can take a file whose larger factors are products for one of FLUX.1; write them whole",
        products=True,
    ),
    _Limit(
        "invokeai",
        ("qwen-image",),
        r"^lora_unet_(?!transformer_blocks_)",
        "InvokeAI reads what is in the blocks of Qwen-Image, and leaves out the rest",
    ),
    _Limit(
        "invokeai",
        ("wan",),
        r"^lora_unet_(?!blocks_\d+_((self|cross)_attn_[qkvo]|ffn_[02])$)",
        "InvokeAI reads queries, keys, values, outputs and feed-forward layers of Wan, and leaves out the rest",
    ),
    _Limit("sdnext", ("cosmos",), "", "SD.Next reads adapters of Anima so, but none of Cosmos itself"),
    _Limit("invokeai", ("cosmos",), "", "InvokeAI reads adapters of Anima so, but has no Cosmos itself"),
    _Limit("diffusers", _ENCODERS, "", "Diffusers reads no LoKr of text encoders; `load_krona` does"),
    _Limit("comfyui", (_UNKNOWN,), "", "It is not known whether ComfyUI finds the layers of this model by these names"),
    _Limit("kohya", (_UNKNOWN,), "", "It is not known that kohya's scripts have this model"),
)


def naming(program: Program, component: str, module: nn.Module, components: Mapping[str, nn.Module]) -> Naming:
    """How a program names the layers of a model.

    Args:
        program: whom the file is for.
        component: the model's name in its pipeline; "" for a model by itself.
        module: the model.
        components: the pipeline's models, which tell whose text encoder it is.

    Raises:
        AdapterFileError: the program reads nothing of that kind.
    """
    family = _family(module, components)
    if family in _ENCODERS:
        found = _encoder_naming(program, family, component, module, components)
    elif family == _UNKNOWN and program in _ANY_MODEL:
        found = _ANY_MODEL[program]
        found = _KOHYA_DIFFUSERS if component == "unet" and found is _ONETRAINER else found
    else:
        found = _NAMINGS[program].get(family, _NO_SUCH_MODEL)
    if isinstance(found, str):
        raise AdapterFileError(f"{TITLES[program]} cannot read an adapter of {type(module).__name__}: {found}.")
    if found.prefix == _PEFT.prefix:
        part = component or ("unet" if is_unet(module) else "text_encoder" if family in _ENCODERS else "transformer")
        return replace(found, prefix=f"{part}.")
    return found


def layer_name(naming: Naming, name: str, original: str | None) -> str:
    """What a layer is called in the file.

    Args:
        naming: the program's.
        name: the layer's name in its model.
        original: the one that `original_layers` tells; None if it tells none.

    Raises:
        AdapterFileError: the layer has no name there.
    """
    spelling = Spelling(naming.prefix, naming.separator)
    if naming.original and original is None:
        if naming.single is None:
            raise AdapterFileError(
                f"The layer {name} is a part of a larger one there, and has no name of its own: leave it out, or "
                f"{_AS_LORA}."
            )
        spelling = naming.single
    own = original if naming.original and original is not None else name
    return spelling.prefix + own.replace(".", spelling.separator)


def original_layers(module: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Layer of a model → its name in other programs, for those that are one layer there, too.

    This is the name in the original checkpoints; of CLIP's layers the one with `text_model.`, which newer versions of
    transformers do without; and in a language model the one from `layers.` on.
    """
    names = {name: name for name in layers}
    if is_unet(module):
        return names | original_names(module, names)
    layout = layout_of(module)
    if isinstance(module, PreTrainedModel):
        return {name: _in_encoder(module, name) for name in names}
    if layout is None:
        return names
    for original, parts in layout.parts(module):
        for part in parts:
            if parts != (Part(part.module),):
                names.pop(part.module, None)
            elif names.get(part.module) == part.module:
                names[part.module] = original
    return names


def warnings_for(
    program: Program,
    component: str,
    module: nn.Module,
    layers: Collection[str],
    products: Collection[str] = (),
    factors: Mapping[str, FactorShapes] | None = None,
    components: Mapping[str, nn.Module] | None = None,
) -> list[str]:
    """What a program does not do with some layers of a model's adapter, a sentence each.

    Args:
        program: whom the file is for.
        component: the model's name in its pipeline.
        module: the model.
        layers: the layers' names in the file.
        products: those of them whose larger factor is a product of two in the file.
        factors: layer → the shapes of its factors.
        components: the pipeline's models, which tell Anima from Cosmos.
    """
    family = _family(module, components or {component: module})
    found = []
    for limit in _LIMITS:
        concerned = products if limit.products else layers
        names = [name for name in concerned if re.search(limit.layers, name)]
        if limit.program == program and family in limit.families and names:
            found.append(f"{limit.text} ({len(names)} of {len(layers)} layers, for example {few(names)}).")
    about_detection = _about_detection(family, module, layers) if program == "invokeai" else ()
    return [*found, *about_detection, *_about_shapes(program, factors or {})]


def lycoris_reads(shapes: FactorShapes) -> bool:
    """Whether LyCORIS' loader takes factors of these shapes, which it has to get from one number, "factor".

    It tries the most square ones, and else the largest number of A's shape, or of B's, that is a part of both sides.
    """
    larger = (max(shapes.a1, shapes.a2), max(shapes.b1, shapes.b2))
    in_both = [number for number in larger if number in {shapes.a1, shapes.b1} & {shapes.a2, shapes.b2}]
    return any(_are_told_by(number, [shapes]) for number in (-1, *(in_both[:1] or [min(larger)])))


def diffusers_reads(shapes: Collection[FactorShapes]) -> bool:
    """Whether Diffusers takes factors of these shapes, which it has to get from one number for all layers."""
    return any(_are_told_by(number, shapes) for number in (-1, *{one.a1 for one in shapes}))


def _are_told_by(number: int, shapes: Iterable[FactorShapes]) -> bool:
    return all(
        (one.a1, one.b1) == _split(one.d, number) and (one.a2, one.b2) == _split(one.h, number) for one in shapes
    )


def _split(size: int, factor: int) -> tuple[int, int]:
    """A side as LyCORIS and PEFT split it: the smaller part, and the larger.

    One is the factor where that divides the side; otherwise the smaller is the largest divisor up to it and the root.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    smaller = max(n for n in range(1, limit + 1) if size % n == 0 and n * n <= size)
    return smaller, size // smaller


def _about_shapes(program: Program, factors: Mapping[str, FactorShapes]) -> Iterator[str]:
    odd = [name for name, shapes in factors.items() if not lycoris_reads(shapes)]
    if program == "kohya" and odd:
        yield (
            "LyCORIS, by which kohya's scripts read LoKr, refuses factors that are not split by one number, as those "
            f"with a1 = a2 are ({len(odd)} of {len(factors)} layers, for example {few(odd)})."
        )
    if program == "diffusers" and not diffusers_reads(factors.values()):
        yield (
            "Diffusers by itself refuses factors that are not split by one number in all layers, as those with a1 = a2 "
            "are; `load_krona` reads the file."
        )


def _about_detection(family: str, module: nn.Module, layers: Collection[str]) -> Iterator[str]:
    """What InvokeAI tells a model by, or needs together, and a file lacks."""
    if family == "unet" and not any(name.endswith(("attn2_to_k", "attn2_to_v")) for name in layers):
        yield "InvokeAI recognizes Stable Diffusion 1.x and 2.x by attn2's to_k and to_v, which the file has not."
    if family == "flux2":
        config: Any = module.config
        narrow = config.num_attention_heads * config.attention_head_dim == _WIDTH_OF_FLUX1
        needed = ("img_attn.proj", "img_mlp.0")[: 1 + narrow]
        if missing := [name for name in needed if not any(layer.endswith(f".{name}") for layer in layers)]:
            yield f"InvokeAI tells FLUX.2 from FLUX.1 by {' and '.join(missing)} in any block, which the file has not."
    if family == "flux":
        halves = [name for name in layers if any(one not in layers for one in _together(name))]
        if halves:
            yield f"InvokeAI refuses a file of FLUX.1 without all of queries, keys and values, as of {few(halves)}."


def _together(name: str) -> list[str]:
    """The queries, keys and values of the attention that a name is of, in a double block of FLUX.1."""
    match = re.fullmatch(r"(lora_transformer_transformer_blocks_\d+_attn_)(to_[qkv]|add_[qkv]_proj)", name)
    if match is None:
        return []
    whole = "to_qkv" if match[2].startswith("to_") else "to_added_qkv"
    return [match[1] + single for single in FUSED_PROJECTIONS[whole]]


def _in_encoder(module: nn.Module, name: str) -> str:
    if type(module).__name__.startswith("CLIPText"):
        return with_text_model(name)
    return re.sub(r"^.*?\b(?=layers\.\d)", "", name)


def _family(module: nn.Module, components: Mapping[str, nn.Module]) -> str:
    """What the table has a model under: its layout's family, or a kind of UNet or text encoder."""
    kind = type(module).__name__
    if is_unet(module):
        return "sdxl" if is_sdxl_unet(module) else "unet"
    layout = layout_of(module)
    if "Framepack" in kind:
        return "framepack"
    if layout is not None:
        return "anima" if layout.family == "cosmos" and _is_anima(components) else layout.family
    if not isinstance(module, PreTrainedModel):
        return _UNKNOWN
    return "clip" if kind.startswith("CLIPText") else "t5" if kind.startswith(("T5", "UMT5")) else "llm"


def _is_anima(components: Mapping[str, nn.Module]) -> bool:
    return any(type(other).__name__ == "AnimaTextConditioner" for other in components.values())


def _encoder_naming(
    program: Program, family: str, component: str, module: nn.Module, components: Mapping[str, nn.Module]
) -> Naming | str:
    """How a program names the layers of a text encoder, or why it reads none; most by kohya's names."""
    tensors: Tensors = "lokr"
    if program == "diffusers" or (program == "lora" and "transformer" in components):
        tensors = "lora_A/lora_B" if program == "lora" else tensors
        return replace(_PEFT, original=family == "clip", tensors=tensors)
    if program == "lora":
        tensors = "lora_down/lora_up"
    kohya = Naming("lora_te_", "_", original=True, tensors=tensors)
    if family == "llm":
        return _NO_SUCH_ENCODER if program in ("sdnext", "invokeai") and not _is_anima(components) else kohya
    of_clip = any(type(other).__name__.startswith("CLIPText") for other in components.values())
    if family == "t5":
        if program == "comfyui" and not of_clip:
            kind = "umt5xxl" if type(module).__name__.startswith("UMT5") else "t5xxl"
            return Naming(f"text_encoders.{kind}.transformer.", ".", original=True)
        if program in ("sdnext", "invokeai"):  # of FLUX.1
            return replace(kohya, prefix="lora_te2_") if component == "text_encoder_2" else _NO_SUCH_ENCODER
        return replace(kohya, prefix="lora_te3_")
    if program == "invokeai" and "text_encoder_3" in components:
        return _NO_SUCH_ENCODER
    of_sd1 = not {"text_encoder_2", "text_encoder_3", "transformer"} & set(components)
    if of_sd1 and not any(map(is_sdxl_unet, components.values())):
        return kohya
    return replace(kohya, prefix="lora_te2_" if component == "text_encoder_2" else "lora_te1_")
