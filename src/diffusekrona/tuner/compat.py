"""Every name of PEFT, PyTorch, Diffusers, accelerate and Python that is not public, and why we need it.

A new version of one of them that moves such a name is met here, and in `mixed.py`, which changes one of PEFT's classes.
"""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import peft.mapping
import peft.tuners.boft.layer
import torch
from accelerate.state import AcceleratorState
from accelerate.utils.environment import parse_flag_from_env
from peft.tuners.ia3 import IA3Model
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
    onload_layer,
    set_adapter,
)
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.integrations import dequantize_bnb_weight
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

__all__ = [  # of PEFT's and accelerate's, under their own names
    "BaseTuner",  # what a tuner is derived from
    "BaseTunerLayer",  # what all methods' layers are
    "ModulesToSaveWrapper",  # around a module that an adapter trains in full
    "NoMatchingPeftModuleError",  # target_modules fits nothing
    "check_adapters_to_merge",  # which adapters a layer's merge is of
    "dequantize_bnb_weight",
    "parse_flag_from_env",  # as accelerate reads what its launcher says
    "set_adapter",  # of one class of layers in a model
]

include_all_linear_layers = _maybe_include_all_linear_layers
"""What `target_modules="all-linear"` means in a model."""

is_targeted = check_target_module_exists
"""Whether a config targets the layer of a name."""

scales_inputs = IA3Model._check_target_module_feedforward
"""Whether PEFT's (IA)³ multiplies the inputs of the layer of a name, by its config; else it multiplies the outputs."""

ADAPTED = "_hf_peft_config_loaded"
"""The attribute by which Diffusers and transformers know that a model has adapters."""

COMPILED = "_orig_mod"
"""The attribute and prefix under which torch.compile's wrapper has the module that it is around."""


def enter_in_peft(method: Any, config: type, tuner: type[BaseTuner], prefix: str) -> None:
    """Make a method one of PEFT's. Its `register_peft_method` takes members of PEFT's own enum only."""
    tables: Any = peft.mapping
    tables.PEFT_TYPE_TO_CONFIG_MAPPING[method] = config
    tables.PEFT_TYPE_TO_TUNER_MAPPING[method] = tuner
    tables.PEFT_TYPE_TO_PREFIX_MAPPING[method] = prefix


def tuner_of(method: Any) -> Any:
    """The tuner of a method in PEFT's tables; None if it has none."""
    tables: Any = peft.mapping
    return tables.PEFT_TYPE_TO_TUNER_MAPPING.get(method)


@contextmanager
def block_diagonals() -> Iterator[None]:
    """In this context PEFT's BOFT knows several rotations without its CUDA extension, and does not try to build it."""
    boft: Any = peft.tuners.boft.layer
    before = boft._FBD_CUDA
    boft._FBD_CUDA = _BlockDiagonals()
    try:
        yield
    finally:
        boft._FBD_CUDA = before


class _BlockDiagonals:
    """What that extension does: blocks of m × n × b × b → m × n·b × n·b."""

    def forward(self, blocks: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.stack([torch.block_diag(*own) for own in blocks]),)


def execution_device(layer: Any) -> torch.device:
    """Where a layer computes whose weight accelerate has offloaded to nowhere."""
    return torch.device(getattr(getattr(layer, "_hf_hook", None), "execution_device", layer.weight.device))


def onloaded(adapted: BaseTunerLayer) -> AbstractContextManager[None]:
    """The weight of a layer's base in its place, and back to where accelerate lets it wait."""
    base: Any = adapted.get_base_layer()
    hooked = base.weight.is_meta and hasattr(base, "_hf_hook")
    return onload_layer(adapted) if hooked else nullcontext()


def offload_folder(module: nn.Module) -> str | None:
    """The folder in which Diffusers' group offloading keeps a module's weights; None if it keeps none there."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("group_offloading")
    return None if hook is None else hook.config.offload_to_disk_path or None


def is_feed_forward(module: nn.Module) -> bool:
    """Whether a module is Diffusers' block of feed-forward layers."""
    from diffusers.models.attention import FeedForward  # a second of processor time

    return isinstance(module, FeedForward)


def is_compiled(model: Any, component: nn.Module) -> bool:
    """Whether torch.compile has compiled a pipeline's component, or a model, as a whole or in parts."""
    wrapped = [model] if isinstance(model, nn.Module) else model.components.values()
    whole = any(getattr(part, COMPILED, None) is component for part in wrapped)
    return whole or any(part._compiled_call_impl is not None for part in component.modules())


def fake_tensors() -> AbstractContextManager[Any]:
    """Tensors made in this context have shapes and dtypes, and no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def storage_key(tensor: torch.Tensor) -> int:
    """What tells a tensor's memory from that of others that live, also where it holds no numbers."""
    key: int = tensor.untyped_storage()._cdata
    return key


def recompute_blocks(model: Any, function: Callable[..., Any]) -> None:
    """Let gradient checkpointing call this function for each block, in Diffusers' and transformers' models."""
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)


@contextmanager
def recomputing(model: Any, inputs: Callable[..., tuple[Any, ...]]) -> Iterator[None]:
    """Where gradient checkpointing is on in a model of Diffusers, let it give its blocks other inputs meanwhile.

    Args:
        model: the model, compiled or not.
        inputs: of (block, *inputs), what the block is to be given.
    """
    model = getattr(model, COMPILED, model)
    if not model.gradient_checkpointing:
        yield
        return
    call = model._gradient_checkpointing_func
    model._gradient_checkpointing_func = lambda block, *given: call(block, *inputs(block, *given))
    try:
        yield
    finally:
        model._gradient_checkpointing_func = call


def forget_accelerator_state() -> None:
    """Let a process make another `Accelerator`: accelerate keeps one state and refuses a second precision."""
    AcceleratorState._reset_state()


def padding_of(convolution: nn.Conv2d) -> list[int]:
    """A convolution's padding as `functional.pad` takes it, for the modes that need it."""
    return convolution._reversed_padding_repeated_twice


def prepared_optimizers(accelerator: Any) -> list[Any]:
    """The optimizers that an accelerator has prepared; their parameters are what a script trains."""
    return list(accelerator._optimizers)


def hooks_beside(handle: Any) -> OrderedDict[int, Any]:
    """All hooks of the kind that a handle of accelerate's is for, in the order in which they are called.

    Registered hooks come last, and a script's hooks for LoRA raise before ours is called.
    """
    hooks: OrderedDict[int, Any] = handle.hooks_dict_ref()
    return hooks


def has_listeners(layer: nn.Module) -> bool:
    """Whether hooks or a replaced forward method want to see a layer's call."""
    return bool(
        "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is on: neither sees into autograd functions."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


_expressions: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def parsed_expression(text: str) -> Any:
    """A regular expression as Python's `re` understands it, from which `patterns.py` tells how long a match may take.

    Raises:
        re.error, OverflowError, RecursionError: it is none.
    """
    return _expressions.parse(text)


def adapters_off(layers: Iterable[BaseTunerLayer]) -> AbstractContextManager[None]:
    """Let PEFT's layers be their base layers for a while.

    Their own `enable_adapters` also takes the factors out of the training.
    """
    return _set_meanwhile(layers, "_disable_adapters", True)


def only_active(layers: Iterable[BaseTunerLayer], adapter_names: list[str]) -> AbstractContextManager[None]:
    """Let these be the active adapters of PEFT's layers for a while.

    Their own `set_adapter` also takes the factors of others out of the training.
    """
    return _set_meanwhile(layers, "_active_adapter", adapter_names)


@contextmanager
def _set_meanwhile(layers: Iterable[BaseTunerLayer], attribute: str, value: Any) -> Iterator[None]:
    before = [(layer, getattr(layer, attribute)) for layer in layers]
    for layer, _ in before:
        setattr(layer, attribute, value)
    try:
        yield
    finally:
        for layer, former in before:
            setattr(layer, attribute, former)
