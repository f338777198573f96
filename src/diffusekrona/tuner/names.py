"""The grammar of names: of layers and factors in models, of the same in files, and of a pipeline's components.

A tensor of an adapter is `<component>.<layer>.krona_<factor>`; the component is left out for a single model. PEFT's
files put `base_model.model.` before the layer, a layer under another method's adapter has `.base_layer` in its name,
and a compiled model's names start with `_orig_mod.`. None of these three says anything of the adapter.
"""

from __future__ import annotations

from .compat import COMPILED

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

FACTORS = ("A", "B", "B1", "B2")
PREFIX = "krona_"
"""Of the factors' names, by which PEFT knows what is KronA's."""

PEFT_PREFIX = "base_model.model."

_OF_WRAPPERS = {"base_layer", COMPILED}


def factor_name(layer: str, factor: str) -> str:
    """The name of a layer's factor, one of `FACTORS`."""
    return f"{layer}.{PREFIX}{factor}"


def layer_of(tensor_name: str) -> str:
    """The layer whose factor has this name."""
    return tensor_name.rpartition(f".{PREFIX}")[0]


def unwrapped_name(name: str) -> str:
    """A layer's or tensor's name as it is without other adapters around the layer, and without torch.compile."""
    return ".".join(part for part in name.split(".") if part not in _OF_WRAPPERS)


def without_peft_prefix(name: str) -> str:
    """A name in PEFT's files as it is in the model."""
    return name.removeprefix(PEFT_PREFIX)


def in_component(component: str, name: str) -> str:
    """A name with its component in front; as it is for a single model, ""."""
    return f"{component}.{name}" if component else name


def without_component(component: str, name: str) -> str:
    """The opposite of `in_component`."""
    return name.removeprefix(f"{component}.") if component else name


def is_denoiser(component: str) -> bool:
    """Whether a component is what the paper adapts for SDXL: the denoiser, or a module given by itself."""
    return component == "" or component in DENOISERS
