"""Which layers of a model a config targets, by names or by a word such as "attention", and what it says of each."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import TypeVar

from torch import nn

from ..errors import ConfigError, FactorShapeError
from ..kron.shapes import UpdateShapes, factor_shapes, nearest_divisors, update_shapes
from .compat import BaseTunerLayer, include_all_linear_layers, is_feed_forward, is_targeted
from .config import KronAConfig
from .fields import ATTENTION, PRESETS
from .layer import layer_size
from .names import unwrapped_name
from .patterns import check_matching, first_match
from .projections import is_copy, unused_layers

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
    `feed_forward` or alike, and of FLUX's parallel blocks. Copies that fusing made of an attention's projections are
    none of them, nor is what an IP-Adapter has brought: an adapter is for the model without it, too.

    Raises:
        ConfigError: cross-attention or feed-forward is asked for, and the model has none.
    """
    word = config.target_modules
    if not isinstance(word, str) or word not in PRESETS:
        return config
    chosen = copy.copy(config)
    chosen.target_modules = _meant(word, model)
    leave_out_ip_adapters(chosen, model)
    return chosen


def leave_out_ip_adapters(config: KronAConfig, model: nn.Module, held: Collection[str] = ()) -> None:
    """Let a config target nothing that an IP-Adapter's projection of images has, but layers that are held."""
    brought = {name for name in _brought_by_ip_adapters(model) if name not in held}
    targets = target_layers(model, config).keys() if brought else set()
    if not brought.isdisjoint(targets):
        target_only(config, model, targets - brought)


def _meant(word: str, model: nn.Module) -> set[str]:
    if word == "cross-attention":
        names = set(_cross_attention_layers(model))
        if not names:
            raise ConfigError(
                f"The {type(model).__name__} has no cross-attention that Diffusers marks as such, as transformers with "
                'joint attention have none; choose "attention", or name layers in target_modules.'
            )
        return names
    names = set(ATTENTION_LAYERS) | _not_ending_in(ATTENTION_LAYERS, _attention_layers(model))
    if word != ATTENTION:
        found = set(_feed_forward_layers(model)) | set(_ending_in(FEED_FORWARD_LAYERS, model))
        if not found:
            raise ConfigError(
                f"The {type(model).__name__} has no feed-forward of linear layers that is known; "
                'choose "attention", or name layers in target_modules.'
            )
        names |= set(FEED_FORWARD_LAYERS) | _not_ending_in(FEED_FORWARD_LAYERS, iter(found))
    return names


def _brought_by_ip_adapters(model: nn.Module) -> Iterator[str]:
    """Names of the linear layers with which an IP-Adapter projects its images; its processors' are none of attention's.

    `encoder_hid_proj` holds them; that of Kandinsky or Kolors, which belongs to the model, has no attention.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "encoder_hid_proj":
            yield from _linear_layers(name, module)


def _attention_layers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if _is_attention(module):
            yield from _own_layers(name, module)


def _own_layers(name: str, attention: nn.Module) -> Iterator[str]:
    """The linear layers of an attention, without its fused copies and those of its processor."""
    for child_name, child in attention.named_children():
        if child_name == "processor" or is_copy(attention, child_name):
            continue
        if _is_linear(child):
            yield _path(name, child_name)
        else:
            yield from _linear_layers(_path(name, child_name), child)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "processor") and hasattr(module, "set_processor")


def _cross_attention_layers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if getattr(module, "is_cross_attention", False):
            yield from _own_layers(name, module)


def _feed_forward_layers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if is_feed_forward(module):
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
        if _is_linear(child):
            yield path
        else:
            yield from _linear_layers(path, child)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, nn.Linear)


def _path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _ending_in(common: tuple[str, ...], model: nn.Module) -> Iterator[str]:
    endings = tuple(f".{name}" for name in common)
    return (name for name, _ in model.named_modules() if f".{name}".endswith(endings))


def _not_ending_in(common: tuple[str, ...], names: Iterator[str]) -> set[str]:
    endings = tuple(f".{name}" for name in common)
    return {name for name in names if not f".{name}".endswith(endings)}


Value = TypeVar("Value", bound=Hashable)


def target_layers(model: nn.Module, config: KronAConfig) -> dict[str, nn.Module]:
    """The layers of a model that a config targets, by dotted name. Other adapters' insides do not count.

    Raises:
        ConfigError: the config's patterns could take all too long to match this model's names.
    """
    config = resolved(config, model)
    named = dict(model.named_modules())
    _check_matching(config, named)
    inside = tuple(f"{name}." for name, module in named.items() if isinstance(module, BaseTunerLayer))
    return {
        name: module
        for name, module in named.items()
        if name and not name.startswith(inside) and is_targeted(config, name)
    }


def _check_matching(config: KronAConfig, names: Collection[str]) -> None:
    choices = (config.target_modules, config.exclude_modules)
    lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or ()
    whole = [choice for choice in choices if isinstance(choice, str)]
    endings = [
        *lists,
        *(config.modules_to_save or ()),
        *config.factor_pattern,
        *config.alpha_pattern,
        *config.terms_pattern,
    ]
    indices = [] if isinstance(config.layers_to_transform, int) else config.layers_to_transform or []
    plain = len(indices) + sum(len(choice) for choice in choices if choice and not isinstance(choice, str))
    check_matching(names, whole, endings, plain)


def layer_factors(config: KronAConfig, layer_name: str, outputs: int) -> tuple[int, int]:
    """(a1, a2) of a layer: the first match in `factor_pattern`, else the config's own.

    Raises:
        FactorShapeError: b1 is given and does not divide the outputs.
    """
    found = config.factor_pattern.get(first_match(config.factor_pattern, layer_name))
    if found is not None:
        return found
    if config.a1 is not None:
        return config.a1, config.a2
    b1 = config.b1 or 1
    if outputs % b1:
        near = " and ".join(map(str, nearest_divisors(outputs, b1)))
        raise FactorShapeError(f"b1={b1} does not divide its {outputs} output features (nearest divisors: {near})")
    return outputs // b1, config.a2


def layer_scale(config: KronAConfig, layer_name: str) -> float:
    """The scale s of a layer: alpha, the first match in `alpha_pattern` or the config's own, as `scaling` takes it."""
    alpha = float(config.alpha_pattern.get(first_match(config.alpha_pattern, layer_name), config.alpha))
    if config.scaling == "alpha":
        return alpha
    _, a2 = config.factor_pattern.get(first_match(config.factor_pattern, layer_name), (0, config.a2))
    return alpha / math.sqrt(layer_terms(config, layer_name) * a2)


def layer_terms(config: KronAConfig, layer_name: str) -> int:
    """Number of terms of a layer: the first match in `terms_pattern`, else the config's own."""
    return config.terms_pattern.get(first_match(config.terms_pattern, layer_name), config.num_terms)


def layer_shapes(config: KronAConfig, layer_name: str, layer: nn.Module) -> UpdateShapes:
    """What a config trains in a layer, itself or under other adapters.

    Raises:
        FactorShapeError: the layer is neither linear nor a convolution that can be adapted, its size is not divisible
            by its factors, or the layout does not suit it.
    """
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    d, h, kernel = layer_size(base)
    if kernel and config.layout != "kron":
        raise FactorShapeError(f"it is a {type(base).__name__}, and the layout {config.layout!r} is for linear layers")
    factors = factor_shapes(d, h, *layer_factors(config, layer_name, d))
    return update_shapes(factors, layer_terms(config, layer_name), config.b_rank, kernel)


def settle_targets(config: KronAConfig, model: nn.Module, only: Collection[str] | None = None) -> None:
    """Write into a config what its words mean in a model, and check that every layer it targets fits.

    Args:
        config: changed in `target_modules`.
        model: what it is for.
        only: names of the layers that count; None for all that are targeted.

    Raises:
        FactorShapeError: some cannot take their factors; the text lists them.
        ConfigError: some are not called by the model, as fused projections that were unfused again.
    """
    config.target_modules = resolved(config, model).target_modules
    config = include_all_linear_layers(config, model)
    targets = target_layers(model, config)
    if only is not None:
        only = {unwrapped_name(name) for name in only}
        targets = {name: layer for name, layer in targets.items() if unwrapped_name(name) in only}
    unused = {name: why for name, why in unused_layers(model).items() if name in map(unwrapped_name, targets)}
    if unused:
        raise ConfigError(
            f"{len(unused)} targeted layer(s) of the {type(model).__name__} are not called, so that an adapter would "
            f"be without effect; nothing was changed.{listed(unused)}\n"
            "Target to_q, to_k and to_v instead, or fuse the projections again with fuse_qkv_projections."
        )
    problems = {}
    for name, layer in targets.items():
        try:
            layer_shapes(config, name, layer)
        except FactorShapeError as error:
            problems[name] = str(error)
    if problems:
        raise FactorShapeError(
            f"{len(problems)} targeted layer(s) cannot take these factors; nothing was changed.{listed(problems)}\n"
            "Choose other factors for them with factor_pattern={'name or regular expression': (a1, a2)}, the flag "
            "--factors, or leave them out with exclude_modules, or with --target-modules that do not match them."
        )
    for pattern in config.factor_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
            message = f"factor_pattern has {pattern!r}, which matches no targeted layer."
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def listed(problems: Mapping[str, str], shown: int = 3) -> str:
    """The first few layers' problems, a line each, for the end of an error's text."""
    lines = "".join(f"\n  {name}: {problem}." for name, problem in list(problems.items())[:shown])
    return lines + (f"\n  and {len(problems) - shown} more." if len(problems) > shown else "")


def target_only(config: KronAConfig, model: nn.Module, names: Collection[str]) -> None:
    """Let a config target just the named layers of a model."""
    config.target_modules = set(names)
    if target_layers(model, config).keys() != set(names):  # a name may end as another one does
        config.target_modules = "|".join(map(re.escape, names))


def common_and_pattern(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """The commonest of the layers' values, and a `factor_pattern`, or `alpha_pattern`, that tells the others'."""
    common = Counter(values.values()).most_common(1)[0][0]
    # The first match counts, and a name matches all that end as it does; the layers that another's name would give a
    # wrong value come first. One pattern for all others of a value: there may be hundreds.
    misled = sorted((name for name in values if _is_misled(name, values)), key=len, reverse=True)
    alike: dict[Value, list[str]] = {}
    for name, value in values.items():
        if value != common and name not in misled:
            alike.setdefault(value, []).append(re.escape(name))
    pattern = {re.escape(name): values[name] for name in misled}
    return common, pattern | {"|".join(names): value for value, names in alike.items()}


def _is_misled(name: str, values: Mapping[str, object]) -> bool:
    parts = name.split(".")
    endings = (".".join(parts[start:]) for start in range(1, len(parts)))
    return any(ending in values and values[ending] != values[name] for ending in endings)
