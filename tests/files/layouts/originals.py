"""Models of every family in full width and without weights, and what other programs' files hold for their layers.

Widths are those of the published models, as some converters count on them. A tensor has all its rows and, where it has
columns, two of them: no layout says anything about columns.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffusekrona.files.layouts.families import LAYOUTS
from diffusekrona.files.layouts.layout import Layout, Part, outputs

FAMILIES = {layout.family: layout for layout in LAYOUTS}

Original = tuple[str, tuple[Part, ...]]


@dataclass(frozen=True)
class Example:
    """A model of a family.

    Attributes:
        family: the family's name.
        kind: the class of Diffusers.
        config: what differs from the class's defaults.
        depth: what makes it shallow.
        scales: whether the original calls a norm's weight "scale".
    """

    family: str
    kind: str
    config: Mapping[str, Any]
    depth: Mapping[str, Any]
    scales: bool = False

    @property
    def layout(self) -> Layout:
        return FAMILIES[self.family]

    def build(self, shallow: bool = True) -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = getattr(diffusers, self.kind)(**{**self.config, **(self.depth if shallow else {})})
        return model


_DOUBLE_AND_SINGLE = {"num_layers": 2, "num_single_layers": 2}
_BLOCKS = {"num_layers": 2}
_HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "num_attention_heads": 4,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": [0, 1],
}

EXAMPLES = {
    "flux": Example("flux", "FluxTransformer2DModel", {"guidance_embeds": True}, _DOUBLE_AND_SINGLE, scales=True),
    "chroma": Example(
        "chroma", "ChromaTransformer2DModel", {}, {**_DOUBLE_AND_SINGLE, "approximator_layers": 2}, scales=True
    ),
    "flux2": Example("flux2", "Flux2Transformer2DModel", {}, _DOUBLE_AND_SINGLE, scales=True),
    "sd3": Example("sd3", "SD3Transformer2DModel", {}, _BLOCKS),
    "sd3.5-medium": Example(
        "sd3",
        "SD3Transformer2DModel",
        {"num_layers": 24, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        {"num_layers": 3},
    ),
    "zimage": Example("zimage", "ZImageTransformer2DModel", {"siglip_feat_dim": 1152}, {"n_layers": 2}),
    "qwen-image": Example("qwen-image", "QwenImageTransformer2DModel", {}, _BLOCKS),
    "krea2": Example("krea2", "Krea2Transformer2DModel", {}, _BLOCKS, scales=True),
    "hidream": Example(
        "hidream", "HiDreamImageTransformer2DModel", _HIDREAM, {"num_layers": 1, "num_single_layers": 1}
    ),
    "lumina2": Example("lumina2", "Lumina2Transformer2DModel", {}, _BLOCKS),
    "pixart": Example(
        "pixart", "PixArtTransformer2DModel", {"caption_channels": 4096, "use_additional_conditions": True}, _BLOCKS
    ),
    "sana": Example("sana", "SanaTransformer2DModel", {}, _BLOCKS),
    "sana-sprint": Example(
        "sana", "SanaTransformer2DModel", {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}, _BLOCKS
    ),
    "sana-video": Example("sana", "SanaVideoTransformer3DModel", {}, _BLOCKS),
    "cosmos": Example("cosmos", "CosmosTransformer3DModel", {"extra_pos_embed_type": None}, _BLOCKS),
    "cosmos-2.5": Example(
        "cosmos",
        "CosmosTransformer3DModel",
        {"extra_pos_embed_type": None, "use_crossattn_projection": True, "img_context_dim_in": 1152},
        _BLOCKS,
    ),
    "anima-text": Example("anima-text", "AnimaTextConditioner", {}, _BLOCKS),
    "wan": Example("wan", "WanTransformer3DModel", {}, _BLOCKS),
    "wan-image": Example("wan", "WanTransformer3DModel", {"image_dim": 1280, "added_kv_proj_dim": 5120}, _BLOCKS),
    "wan-vace": Example(
        "wan",
        "WanVACETransformer3DModel",
        {"image_dim": 1280, "added_kv_proj_dim": 5120},
        {"num_layers": 2, "vace_layers": [0, 1]},
    ),
    "wan-animate": Example(
        "wan", "WanAnimateTransformer3DModel", {}, {"num_layers": 2, "inject_face_latents_blocks": 1}
    ),
    "skyreels": Example("wan", "SkyReelsV2Transformer3DModel", {"inject_sample_info": True}, _BLOCKS),
    "chronoedit": Example("wan", "ChronoEditTransformer3DModel", {}, _BLOCKS),
    "hunyuan-video": Example("hunyuan-video", "HunyuanVideoTransformer3DModel", {}, _DOUBLE_AND_SINGLE),
    "framepack": Example(
        "hunyuan-video",
        "HunyuanVideoFramepackTransformer3DModel",
        {"has_image_proj": True, "has_clean_x_embedder": True},
        _DOUBLE_AND_SINGLE,
    ),
}


def layer_names(model: nn.Module) -> list[str]:
    """Names of the modules that have a weight of their own."""
    return [name for name, module in model.named_modules() if "weight" in dict(module.named_parameters(recurse=False))]


def table_only(layout: Layout) -> Layout:
    """The layout without the names that other programs alone have."""
    return replace(layout, also={})


def originals(layout: Layout, model: nn.Module) -> list[Original]:
    """What the original has for all layers of a model: those of the table, the others under the same name."""
    found = list(layout.parts(model))
    named = {part.module for _, parts in found for part in parts}
    return found + [(name, (Part(name),)) for name in layer_names(model) if name not in named]


def keys(layout: Layout, model: nn.Module) -> Iterator[tuple[str, str, list[Original]]]:
    """Each table and key of the layout, with what it stands for in the model."""
    for table in ("table", "also"):
        for key, entry in getattr(layout, table).items():
            yield table, key, list(replace(layout, table={key: entry}, also={}).parts(model))


def together(parts: Iterable[Part], tensors: Mapping[str, Tensor]) -> Tensor:
    """The original's tensor out of those of a model's modules."""
    parts = list(parts)
    if len(parts) == 1 and parts[0].rows is None:
        return tensors[parts[0].module]
    rows = max(part.rows[1] for part in parts if part.rows)
    first = tensors[parts[0].module]
    whole = torch.full((rows, *first.shape[1:]), torch.nan, dtype=first.dtype)
    for part in parts:
        whole[_slice(part.rows)] = tensors[part.module][_slice(part.into)]
    return whole


def apart(parts: Iterable[Part], tensor: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's modules out of the original's."""
    found: dict[str, Tensor] = {}
    for part in parts:
        rows = tensor[_slice(part.rows)]
        shape = (outputs(model.get_submodule(part.module)), *tensor.shape[1:])
        whole = found.setdefault(part.module, torch.full(shape, torch.nan, dtype=tensor.dtype))
        whole[_slice(part.into)] = rows
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Random weights and biases for all layers."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in layer_names(model):
        for kind, values in model.get_submodule(name).named_parameters(recurse=False):
            shape = (len(values), *((2,) if values.dim() > 1 else ()))
            found[f"{name}.{kind}"] = torch.randn(shape, generator=generator)
    return found


def checkpoint(example: Example, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint in the original layout of a model with these tensors."""
    found = {}
    for name, parts in originals(table_only(example.layout), model):
        for kind in ("weight", "bias"):
            own = {part.module: tensors.get(f"{part.module}.{kind}") for part in parts}
            held = {module: tensor for module, tensor in own.items() if tensor is not None}
            if held:
                whole = together(parts, held)
                scale = example.scales and kind == "weight" and whole.dim() == 1
                found[f"{name}.{'scale' if scale else kind}"] = whole
    return found


Named = Callable[[str], str]


def dotted(name: str) -> str:
    """A layer's name in files of ComfyUI, ai-toolkit and others."""
    return f"diffusion_model.{name}"


def underscored(name: str) -> str:
    """A layer's name in files of kohya's programs."""
    return "lora_unet_" + name.replace(".", "_")


def _slice(rows: tuple[int, int] | None) -> slice:
    return slice(None) if rows is None else slice(*rows)
