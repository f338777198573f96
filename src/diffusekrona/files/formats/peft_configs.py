"""What PEFT's configs of LoRA, LoKr and LoHa say beside the scales: used, without meaning for an update, or refused.

A field that is in neither list makes a layer compute something else than its factors tell, or is of a newer PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .updates import LayerTensors

_SCALES = {"r", "rank_pattern", "alpha_pattern"}
_TRAINING = {"rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights"}
_OF_ANY = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save",  # whole modules are tensors of the file, and named as such
}  # fmt: skip
_IN_SHAPES = {"alpha", "decompose_both", "decompose_factor", "use_effective_conv2d"}  # which the factors have

_HARMLESS: dict[str, set[str]] = {
    "LORA": _OF_ANY | _SCALES | {
        "lora_alpha", "use_rslora",
        "use_dora", "lora_bias", "bias",  # what they train are tensors of the file
        "lora_dropout", "megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying",
        "fan_in_fan_out",  # of Conv1D layers, which no model here has
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # init_lora_weights says whether they count
        "init_lora_weights", "qalora_group_size",
    },
    "LOKR": _OF_ANY | _SCALES | _TRAINING | _IN_SHAPES,
    "LOHA": _OF_ANY | _SCALES | _TRAINING | _IN_SHAPES,
}  # fmt: skip

_SAME_BASE = {"true", "false", "gaussian", "eva", "orthogonal", "mica", "none"}
"""Ways to start a LoRA that leave the base's weights alone."""

REBASED = {"pissa", "olora"}
"""Ways that take something out of the base's weights, which those weights alone determine."""


def check(layer: LayerTensors, config: Mapping[str, Any], method: str) -> None:
    """Raise `AdapterFileError` unless all of a config's fields are known to be used or without meaning for a layer.

    Args:
        layer: which the config is for.
        config: as `LayerTensors.peft_config` gives it.
        method: which the layer's tensors are of, "LORA", "LOKR" or "LOHA".
    """
    stated = config.get("peft_type")
    if stated not in (None, method):
        raise layer.error(f"has a config of PEFT's {stated}, whose tensors only PEFT reads")
    strange = sorted(key for key, value in config.items() if key not in _HARMLESS[method] and value)
    if strange:
        raise layer.error(
            f"has a config with {', '.join(f'{key}={config[key]!r}' for key in strange)}, so its factors are not the "
            "whole update: merge it with PEFT's merge_and_unload"
        )
    start = str(config.get("init_lora_weights")).lower()
    if method == "LORA" and start not in _SAME_BASE | REBASED:
        raise layer.error(
            f"was trained with init_lora_weights={config['init_lora_weights']!r}, which changed the base's weights "
            "before training in a way that the file does not tell. Merge it with the program that made it, or convert "
            "it there to a plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )


def is_rebased(config: Mapping[str, Any]) -> bool:
    """Whether the factors count from a base that the start of training changed, see `REBASED`."""
    return str(config.get("init_lora_weights")).lower() in REBASED
