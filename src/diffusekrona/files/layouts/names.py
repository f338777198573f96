"""How other programs name the layers of a model, and which of them they fuse.

Diffusers, PEFT     the component's name and the module's own, `unet.down_blocks.1.….attn1.to_q`; of a single model the
                    latter only, or behind `base_model.model.`. Older Diffusers put adapters into attention processors,
                    `unet.….attn1.processor.to_q`.
ComfyUI, and        `diffusion_model.` and the name in the family's original checkpoint, which `Layout` tells, or the
ai-toolkit          module's own; text encoders as `text_encoders.clip_l.transformer.text_model.…`.
kohya, musubi,      a prefix per component and the name with underscores for dots: in the original checkpoint
OneTrainer          (`lora_unet_input_blocks_4_1_…_attn1_to_q`), or in Diffusers (`lora_transformer_…`).
LyCORIS, SimpleTuner   `lycoris_` and the module's own name with underscores.

A file's layer is one or more parts of modules of the model: rows of the one are rows of the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ...errors import AdapterFileError
from ...tuner.compat import BaseTunerLayer
from ...tuner.names import DENOISERS, PEFT_PREFIX, TEXT_ENCODERS, in_component, unwrapped_name
from ..unused import Unused, few
from .families import LAYOUTS, layout_of
from .layout import Layout, Part, fused_names, redirected, redirections
from .unet import is_unet, original_names

_KOHYA_PREFIXES = {
    "unet": ("lora_unet_", "oft_unet_"),
    "transformer": ("lora_transformer_", "lora_unet_", "oft_unet_"),
    "text_encoder": ("lora_te1_", "lora_te_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
_T5_PREFIX = "lora_te3_"  # kohya's scripts keep it for T5, which is Flux' second text encoder
_LYCORIS_PREFIX = "lycoris_"

_IN_PROCESSOR = re.compile(r"\b(attn\d*)\.(to_q|to_k|to_v|to_out|add_q_proj|add_k_proj|add_v_proj|to_add_out)(\.0)?$")
_IN_CLIP_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

_COMFY_ENCODER = re.compile(r"text_encoders\.(?P<kind>[a-z]+\d*(_[lg])?)\w*\.(transformer\.)?(model\.)?")
_MADE_FOR = {
    r"^lora_te3_|^text_encoder_3\.": "a pipeline with a third text encoder",
    r"^lora_te2_|^text_encoder_2\.": "a pipeline with a second text encoder, such as Stable Diffusion XL",
    r"^lora_te1?_|^text_encoders?\.|text_model": "a pipeline with a text encoder",
    r"[sk][._]\d+[._](\d+[._])?transformer_blocks[._][2-9]": "the UNet of Stable Diffusion XL",
    r"down_blocks[._]0[._]attentions|up_blocks[._]3|input_blocks[._][12][._]1|put_blocks[._](9|10|11)[._]": (
        "the UNet of Stable Diffusion 1.x or 2.x"
    ),
    r"down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks": "a UNet",
    r"double_blocks|single_blocks": "a transformer of FLUX' kind in its original layout",
    r"single_transformer_blocks": "a transformer of FLUX' kind",
    r"transformer_blocks": "a diffusion transformer",
}
"""What a layer's name has in it, most telling first → what it was made for, where no family's signs tell it."""


class Target(NamedTuple):
    """What a layer of a file stands for in a model.

    Attributes:
        component: of the pipeline, "" for a model by itself.
        parts: of its modules.
    """

    component: str
    parts: tuple[Part, ...]

    @property
    def modules(self) -> str:
        """The modules' names, for errors."""
        return " + ".join(dict.fromkeys(in_component(self.component, part.module) for part in self.parts))


def resolve(
    keys: Iterable[str],
    components: Mapping[str, nn.Module],
    source: str = "The adapter",
    unused: Unused | None = None,
) -> dict[str, Target]:
    """What each layer of another program's file stands for in a pipeline.

    Adapters that a model already has make no difference, neither to the names found nor to those returned.

    Args:
        keys: the layers' names as a file writes them.
        components: the pipeline's models by component name, or a single one as "".
        source: what to call the file in errors.
        unused: collects layers that match nothing; without it, they are an error.

    Raises:
        AdapterFileError: some keys match nothing; a key matches several modules; or several match the same one.
    """
    known = _known_names(components)
    found: dict[str, Target] = {}
    taken: dict[tuple[str, Part], str] = {}
    unmatched = []
    for key in keys:
        targets = known.get(_canonical(unwrapped_name(key)), set())
        if not targets:
            unmatched.append(key)
            continue
        if len(targets) > 1:
            names = " and ".join(sorted(target.modules for target in targets))
            raise AdapterFileError(f"{source}: the layer {key} could be {names}; load it into one of these models.")
        found[key] = (target := next(iter(targets)))
        for part in target.parts:
            whole = Part(part.module, None, part.into)
            if taken.setdefault((target.component, whole), key) != key:
                other = taken[target.component, whole]
                raise AdapterFileError(f"{source}: {other} and {key} are the same layer under two names.")
    if unmatched:
        not_used = unused or Unused(source)
        not_used.add(_unmatched(unmatched, len(unmatched) + len(found), components, source))
        if unused is None:
            not_used.report(len(found))
    return found


def layout_by(keys: Collection[str]) -> Layout | None:
    """The family that a file's layers have the names of; None if they do not tell, or are of several."""
    families = [one for one in LAYOUTS if any(re.search(sign, key) for sign in one.signs for key in keys)]
    return families[0] if len(families) == 1 else None


def made_for(keys: Iterable[str]) -> str | None:
    """What model a file's layers look made for; None if their names do not tell."""
    names = list(keys)
    if (layout := layout_by(names)) is not None:
        return layout.title
    return next((made for sign, made in _MADE_FOR.items() if any(re.search(sign, key) for key in names)), None)


def foreign_names(component: str, module: nn.Module) -> dict[str, str]:
    """Every name that other programs may give to a layer of this model that is one layer in theirs, too → its name.

    Args:
        component: the model's name in its pipeline, such as "unet"; "" for a model by itself.
        module: the model.
    """
    return {
        alias: parts[0].module
        for alias, parts in _foreign_names(component, module)
        if len(parts) == 1 and parts[0] == Part(parts[0].module)
    }


def _foreign_names(component: str, module: nn.Module) -> Iterator[tuple[str, tuple[Part, ...]]]:
    role = _role(component, module)
    for own, parts in _names_within(role, module):
        for alias in _aliases(role, module, own):
            yield alias, parts


def _names_within(role: str, model: nn.Module) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """What a file's layers may be called within a model, and what they are there."""
    modules = {unwrapped_name(name): module for name, module in model.named_modules()}
    fused = redirections(modules)
    layers = layer_names(model)
    originals = original_names(model, layers) if is_unet(model) else {}
    for name in layers:
        whole = redirected((Part(name),), fused, modules)
        for own in _own_names(role, name) | ({originals[name]} if name in originals else set()):
            yield own, whole
    yield from fused_names(modules)
    layout = layout_of(model)
    if layout is not None:
        for original, parts in layout.parts(model):
            yield original, redirected(parts, fused, modules)


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


def _known_names(components: Mapping[str, nn.Module]) -> dict[str, set[Target]]:
    known: dict[str, set[Target]] = {}
    for component, module in components.items():
        for alias, parts in _foreign_names(component, module):
            known.setdefault(alias, set()).add(Target(component, parts))
    return known


def _canonical(key: str) -> str:
    """A key with ComfyUI's many names of text encoders as one for each kind."""
    match = _COMFY_ENCODER.match(key)
    return f"text_encoders.{_encoder_kind(match['kind'])}.{key[match.end() :]}" if match else key


def _encoder_kind(name: str) -> str:
    return next((kind for kind in ("clip_l", "clip_g", "t5", "umt5") if name.startswith(kind)), "llm").replace(
        "umt5", "t5"
    )


def _kind_of(encoder: nn.Module) -> str:
    """What ComfyUI calls a text encoder, the version aside."""
    name = type(encoder).__name__
    if name.startswith("CLIPText"):
        return "clip_g" if getattr(getattr(encoder, "config", None), "hidden_size", 0) > 1024 else "clip_l"
    return "t5" if name.startswith(("T5", "UMT5")) else "llm"


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
        yield f"model.diffusion_model.{own}"
    elif role in TEXT_ENCODERS:
        yield f"text_encoders.{_kind_of(module)}.{own}"


def _own_names(role: str, name: str) -> set[str]:
    """What a layer may be called within its model, the original UNet's names aside."""
    in_processor = _IN_PROCESSOR.sub(r"\1.processor.\2", name)
    names = {name, in_processor, in_processor.replace(".processor.", ".")}
    if role in TEXT_ENCODERS:
        parent, _, last = name.rpartition(".")
        for own in (name, f"{parent}.{_IN_CLIP_ATTENTION.get(last, last)}".lstrip(".")):
            names |= {own.removeprefix("text_model."), with_text_model(own)}
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
    return "unet" if is_unet(module) else "transformer"


def with_text_model(name: str) -> str:
    """A CLIP layer's name as transformers before 5 has it, and files still do: all but the projection is in there."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def _unmatched(keys: list[str], of: int, components: Mapping[str, nn.Module], source: str) -> str:
    made = made_for(keys)
    here = ", ".join(f"{name or 'a model'} ({type(module).__name__})" for name, module in components.items())
    return (
        f"{source}: {len(keys)} of {of} layers match nothing here, for example {few(keys)}. "
        + (f"They look made for {made}. " if made else "")
        + f"Here there is {here}."
    )
