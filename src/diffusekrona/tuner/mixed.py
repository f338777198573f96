"""KronA in PEFT's mixed models, `get_peft_model(…, mixed=True)`, which know their methods by heart.

PEFT has no table for them, so their class has to be changed. That is left until the first `KronAConfig` is made: who
imports this library and makes none finds PEFT as it was. For PEFT's own methods the changed class does what it did.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import peft.mapping
import peft.tuners.mixed
from peft.tuners.mixed.model import PREFIXES, MixedModel

from .compat import set_adapter, tuner_of

Method = Callable[..., Any]


@cache
def allow_mixing(method: Any, factors: tuple[str, ...]) -> None:
    """Let mixed models hold adapters of a method that is entered in PEFT's tables.

    Args:
        method: its entry in PEFT's tables; its tuner has `injecting` and `check_mergeable`, see `KronAModel`.
        factors: what marks the names of its parameters.
    """
    mixed: Any = peft.tuners.mixed
    mixed.COMPATIBLE_TUNER_TYPES = (*mixed.COMPATIBLE_TUNER_TYPES, method)
    PREFIXES.extend(factors)
    tables: Any = peft.mapping
    tables.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[method] = MixedModel
    for name, replacement in {
        "inject_adapter": _inject_adapter,
        "set_adapter": _set_adapter,
        "merge_and_unload": _merge_and_unload,
        "_check_new_adapter_config": _check_new_adapter_config,
        "_create_and_replace": _create_and_replace,
    }.items():
        own: Method = getattr(MixedModel, name)
        setattr(MixedModel, name, wraps(own)(replacement(own, method)))


def _inject_adapter(own: Method, method: Any) -> Method:
    def inject_adapter(
        self: Any,
        model: Any,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
    ) -> None:
        arguments = (self, model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if self.peft_config[adapter_name].peft_type != method:
            own(*arguments)
            return
        with tuner_of(method).injecting(self.peft_config[adapter_name], model, adapter_name, state_dict):
            own(*arguments)

    return inject_adapter


def _set_adapter(own: Method, method: Any) -> Method:
    def set_adapter_of_all(self: Any, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        own(self, adapter_name, inference_mode)
        set_adapter(self.model, adapter_name, inference_mode, layer_cls=tuner_of(method).tuner_layer_cls)

    return set_adapter_of_all


def _merge_and_unload(own: Method, method: Any) -> Method:
    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        tuner_of(method).check_mergeable(self.model, adapter_names)
        return own(self, progressbar, safe_merge, adapter_names)

    return merge_and_unload


def _check_new_adapter_config(own: Method, method: Any) -> Method:
    def check(self: Any, config: Any) -> None:
        if config.peft_type != method:
            own(self, config)

    return check


def _create_and_replace(own: Method, method: Any) -> Method:
    def create_and_replace(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        create = tuner_of(method)._create_and_replace if config.peft_type == method else own
        create(self, config, *args, **kwargs)

    return create_and_replace
