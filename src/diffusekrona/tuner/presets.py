"""What a word such as "attention" means for `target_modules` in a model: which names, which layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

from diffusers.models.attention import FeedForward
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import ConfigError
from .config import ATTENTION, PRESETS, KronAConfig

ATTENTION_LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0",  # UNets and transformers of Diffusers
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",  # the text's side of joint attention
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",  # CLIP text encoders
    "SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o",  # T5 text encoders
)  # fmt: skip
FEED_FORWARD_LAYERS = (
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",  # UNets and transformers
    "mlp.fc1", "mlp.fc2",  # CLIP
    "DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo",  # T5
)  # fmt: skip
_BESIDE_ATTENTION = re.compile(r"(ff|ffn|mlp|feed_forward)(_\w+)?")


def resolved(config: KronAConfig, model: nn.Module) -> KronAConfig:
    """The config with names in place of a word in `target_modules`; itself where there is no word.

    Beside the names that are common, these are all linear layers of what Diffusers gives an attention processor,
    and for feed-forward those of its `FeedForward` modules, of modules beside an attention that are named `ff`,
    `feed_forward` or alike, and of FLUX's parallel blocks.

    Raises:
        ConfigError: cross-attention or feed-forward is asked for, and the model has none.
    """
    word = config.target_modules
    if not isinstance(word, str) or word not in PRESETS:
        return config
    chosen = copy.copy(config)
    if word == "cross-attention":
        chosen.target_modules = set(_cross_attention_layers(model))
        if not chosen.target_modules:
            raise ConfigError(
                f"The {type(model).__name__} has no cross-attention that Diffusers marks as such, as transformers with "
                'joint attention have none; choose "attention", or name layers in target_modules.'
            )
        return chosen
    chosen.target_modules = set(ATTENTION_LAYERS) | _not_ending_in(ATTENTION_LAYERS, _attention_layers(model))
    if word != ATTENTION:
        found = set(_feed_forward_layers(model)) | set(_ending_in(FEED_FORWARD_LAYERS, model))
        if not found:
            raise ConfigError(
                f"The {type(model).__name__} has no feed-forward of linear layers that is known; "
                'choose "attention", or name layers in target_modules.'
            )
        chosen.target_modules |= set(FEED_FORWARD_LAYERS) | _not_ending_in(FEED_FORWARD_LAYERS, iter(found))
    return chosen


def _attention_layers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if _is_attention(module):
            yield from _linear_layers(name, module)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "processor") and hasattr(module, "set_processor")


def _cross_attention_layers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if getattr(module, "is_cross_attention", False):
            yield from _linear_layers(name, module)


def _feed_forward_layers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, FeedForward):
            yield from _linear_layers(name, module)
        elif hasattr(module, "proj_mlp") and hasattr(module, "proj_out"):
            yield from (_path(name, child) for child in ("proj_mlp", "proj_out"))
        elif any(_is_attention(child) for child in module.children()):
            for child_name, child in module.named_children():
                if _BESIDE_ATTENTION.fullmatch(child_name):
                    yield from _linear_layers(_path(name, child_name), child)


def _linear_layers(prefix: str, module: nn.Module) -> Iterator[str]:
    """Names of the linear layers in a module; one with adapters counts as one."""
    for name, child in module.named_children():
        path = _path(prefix, name)
        if isinstance(child.get_base_layer() if isinstance(child, BaseTunerLayer) else child, nn.Linear):
            yield path
        else:
            yield from _linear_layers(path, child)


def _path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _ending_in(common: tuple[str, ...], model: nn.Module) -> Iterator[str]:
    endings = tuple(f".{name}" for name in common)
    return (name for name, _ in model.named_modules() if f".{name}".endswith(endings))


def _not_ending_in(common: tuple[str, ...], names: Iterator[str]) -> set[str]:
    endings = tuple(f".{name}" for name in common)
    return {name for name in names if not f".{name}".endswith(endings)}
