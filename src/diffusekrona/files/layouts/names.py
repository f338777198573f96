"""How other programs name the layers of a model, in both directions.

Diffusers, PEFT     the component's name and the module's own, `unet.down_blocks.1.….attn1.to_q`; of a single model the
                    latter only, or behind `base_model.model.`. Older Diffusers put adapters into attention processors,
                    `unet.….attn1.processor.to_q`. ComfyUI's own are `diffusion_model.` and the original name.
kohya, LyCORIS      a prefix per component and the module's name with underscores for dots,
                    `lora_unet_down_blocks_1_…_attn1_to_q`. kohya's scripts train SDXL, unlike SD 1.x, in its original
                    form, so its files have the original checkpoint's names: `lora_unet_input_blocks_4_1_…_attn1_to_q`.

A UNet's original names follow from its blocks: each ResNet of the way down is an input block of its own, with the
transformer beside it second in it; so is each downsampler; on the way up, an upsampler comes last in an output block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import AdapterFileError
from ...tuner.compat import BaseTunerLayer
from ...tuner.names import DENOISERS, PEFT_PREFIX, TEXT_ENCODERS, in_component, unwrapped_name

_KOHYA_PREFIXES = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_transformer_", "lora_unet_"),
    "text_encoder": ("lora_te1_", "lora_te_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
_T5_PREFIX = "lora_te3_"  # kohya's scripts keep it for T5, which is Flux' second text encoder
_LYCORIS_PREFIX = "lycoris_"

_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_IN_PROCESSOR = re.compile(r"\b(attn\d*)\.(to_q|to_k|to_v|to_out|add_q_proj|add_k_proj|add_v_proj|to_add_out)(\.0)?$")
_IN_CLIP_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

_MADE_FOR = {
    r"double_blocks|single_blocks": "Flux in its original layout, whose fused projections Diffusers has as several",
    r"single_transformer_blocks": "a Flux transformer",
    r"joint_blocks": "Stable Diffusion 3 in its original layout",
    r"^lora_te3_|^text_encoder_3\.": "a pipeline with a third text encoder",
    r"^lora_te2_|^text_encoder_2\.": "a pipeline with a second text encoder, such as Stable Diffusion XL",
    r"^lora_te1?_|^text_encoder\.|text_model|self_attn": "a pipeline with a CLIP text encoder",
    r"[sk][._]\d+[._](\d+[._])?transformer_blocks[._][2-9]": "the UNet of Stable Diffusion XL",
    r"down_blocks[._]0[._]attentions|up_blocks[._]3|input_blocks[._][12][._]1|put_blocks[._](9|10|11)[._]": (
        "the UNet of Stable Diffusion 1.x or 2.x"
    ),
    r"down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks": "a UNet",
    r"transformer_blocks": "a diffusion transformer",
}
"""What a layer's name has in it, most telling first → what it was made for."""


def resolve(
    keys: Iterable[str], components: Mapping[str, nn.Module], source: str = "The adapter"
) -> dict[str, tuple[str, str]]:
    """The module that each layer of another program's file stands for: (component, module name).

    Adapters that a model already has make no difference, neither to the names found nor to those returned.

    Args:
        keys: the layers' names as a file writes them.
        components: the pipeline's models by component name, or a single one as "".
        source: what to call the file in errors.

    Raises:
        AdapterFileError: some keys match nothing; a key matches several modules; or several match the same one.
    """
    known = _known_names(components)
    found: dict[str, tuple[str, str]] = {}
    taken: dict[tuple[str, str], str] = {}
    unmatched = []
    for key in keys:
        targets = known.get(unwrapped_name(key), set())
        if not targets:
            unmatched.append(key)
            continue
        if len(targets) > 1:
            names = " and ".join(sorted(".".join(filter(None, target)) for target in targets))
            raise AdapterFileError(f"{source}: the layer {key} could be {names}; load it into one of these models.")
        found[key] = (target := next(iter(targets)))
        if taken.setdefault(target, key) != key:
            raise AdapterFileError(f"{source}: {taken[target]} and {key} are the same layer under two names.")
    if unmatched:
        raise AdapterFileError(_unmatched(unmatched, len(unmatched) + len(found), components, source))
    return found


def foreign_names(component: str, module: nn.Module) -> dict[str, str]:
    """Every name that other programs may give to a layer of this model → the module's name in it.

    Args:
        component: the model's name in its pipeline, such as "unet"; "" for a model by itself.
        module: the model.
    """
    return dict(_foreign_names(component, module))


def _foreign_names(component: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    role = _role(component, module)
    blocks = dict(_original_blocks(module)) if _is_unet(module) else None
    for name in layer_names(module):
        original = None if blocks is None else _original_name(name, blocks)
        for own in _own_names(role, name) | ({original} if original else set()):
            for alias in _aliases(role, module, own):
                yield alias, name


def layer_names(module: nn.Module) -> list[str]:
    """Names of the modules that have a weight, as they are without the adapters around them."""
    names: list[str] = []
    inside: str | None = None
    for name, child in module.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(child, BaseTunerLayer):
            names.append(name)
            inside = f"{name}."
        elif name and any(own == "weight" for own, _ in child.named_parameters(recurse=False)):
            names.append(name)
    return names


def diffusers_name(component: str, module_name: str, components: Mapping[str, nn.Module]) -> str:
    """A layer's name in a file for Diffusers: the component's and the module's, as all its versions read them."""
    module = components[component]
    name = _with_text_model(module_name) if _is_clip(module) else module_name
    return in_component(component, name)


def kohya_name(component: str, module_name: str, components: Mapping[str, nn.Module]) -> str:
    """A layer's name in a file for kohya's scripts, ComfyUI and others; SDXL's UNet in its original block names.

    Args:
        component: the model's name in its pipeline; "" for a model by itself.
        module_name: the layer's name in the model.
        components: the pipeline's models, which tell SD 1.x' `lora_te_` from the `lora_te1_` of others.
    """
    module = components[component]
    role = _role(component, module)
    prefix = _kohya_prefixes(role, module)[0]
    if role == "text_encoder" and _is_sd1(components):
        prefix = "lora_te_"
    if _is_sdxl_unet(module):
        module_name = original_unet_name(module, module_name) or module_name
    elif _is_clip(module):
        module_name = _with_text_model(module_name)
    return prefix + module_name.replace(".", "_")


def original_unet_name(unet: nn.Module, name: str) -> str | None:
    """A UNet layer's name in the checkpoints of CompVis and Stability AI; None if it has none there."""
    return _original_name(name, dict(_original_blocks(unet)))


def _original_name(name: str, blocks: Mapping[str, str]) -> str | None:
    parts = name.split(".")
    block = next((start for n in (3, 4, 5) if (start := ".".join(parts[:n])) in blocks), None)
    if block is None:
        return _OUTSIDE_BLOCKS.get(name)
    inner = name[len(block) :].lstrip(".")
    inner = _IN_RESNET.get(inner, inner) if ".resnets." in block else inner
    return f"{blocks[block]}.{inner}".rstrip(".")


def _original_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """Each part of a UNet's blocks, by its name here and in the original checkpoint."""
    n = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(getattr(block, "resnets", ()))):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        if getattr(block, "downsamplers", None) is not None:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
            n += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    n = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(getattr(block, "resnets", ()))):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"
            n += 1
        place = 2 if hasattr(block, "attentions") else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{n - 1}.{place}.conv"


def _known_names(components: Mapping[str, nn.Module]) -> dict[str, set[tuple[str, str]]]:
    known: dict[str, set[tuple[str, str]]] = {}
    for component, module in components.items():
        for alias, name in _foreign_names(component, module):
            known.setdefault(alias, set()).add((component, name))
    return known


def _aliases(role: str, module: nn.Module, own: str) -> Iterator[str]:
    """What a layer may be called in a file, with what it may be called within its model."""
    yield own
    yield f"{role}.{own}"
    yield f"{PEFT_PREFIX}{own}"
    yield f"{role}.{PEFT_PREFIX}{own}"
    for prefix in (*_kohya_prefixes(role, module), _LYCORIS_PREFIX):
        yield prefix + own.replace(".", "_")
    if role in DENOISERS:
        yield f"diffusion_model.{own}"


def _own_names(role: str, name: str) -> set[str]:
    """What a layer may be called within its model, the original UNet's names aside."""
    in_processor = _IN_PROCESSOR.sub(r"\1.processor.\2", name)
    names = {name, in_processor, in_processor.replace(".processor.", ".")}
    if role in TEXT_ENCODERS:
        parent, _, last = name.rpartition(".")
        for own in (name, f"{parent}.{_IN_CLIP_ATTENTION.get(last, last)}".lstrip(".")):
            names |= {own.removeprefix("text_model."), _with_text_model(own)}
    return names


def _kohya_prefixes(role: str, module: nn.Module) -> tuple[str, ...]:
    prefixes = _KOHYA_PREFIXES.get(role, ("lora_unet_",))
    if role in TEXT_ENCODERS and type(module).__name__.startswith("T5"):
        return (_T5_PREFIX, *(prefix for prefix in prefixes if prefix != _T5_PREFIX))
    return prefixes


def _role(component: str, module: nn.Module) -> str:
    """The component's name in a pipeline, guessed for a model by itself."""
    if component:
        return component
    if isinstance(module, PreTrainedModel):
        return "text_encoder"
    return "unet" if _is_unet(module) else "transformer"


def _is_unet(module: nn.Module) -> bool:
    return all(hasattr(module, blocks) for blocks in ("down_blocks", "mid_block", "up_blocks"))


def _is_sdxl_unet(module: nn.Module) -> bool:
    return _is_unet(module) and getattr(getattr(module, "config", None), "addition_embed_type", None) == "text_time"


def _is_sd1(components: Mapping[str, nn.Module]) -> bool:
    """Whether there is just one text encoder, and no denoiser that is known to go with several."""
    others = {"text_encoder_2", "text_encoder_3", "transformer"} & set(components)
    return not others and not any(map(_is_sdxl_unet, components.values()))


def _is_clip(module: nn.Module) -> bool:
    return type(module).__name__.startswith("CLIPText")


def _with_text_model(name: str) -> str:
    """A CLIP layer's name as transformers before 5 has it, and files still do: all but the projection is in there."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def _unmatched(keys: list[str], of: int, components: Mapping[str, nn.Module], source: str) -> str:
    few = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    made = next((made for sign, made in _MADE_FOR.items() if any(re.search(sign, key) for key in keys)), None)
    here = ", ".join(f"{name or 'a model'} ({type(module).__name__})" for name, module in components.items())
    return (
        f"{source}: {len(keys)} of {of} layers match nothing here, for example {few}. "
        + (f"They look made for {made}. " if made else "")
        + f"Here there is {here}."
    )
