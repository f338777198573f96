"""KronAModel: puts KronALayers into a model as a KronAConfig says. A PEFT tuner, entered in PEFT's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterNameError, BatchError
from .batch import Batch
from .compat import BaseTuner, BaseTunerLayer, enter_in_peft
from .config import KronAConfig, KronAPeftType
from .injected import adapters_by_sample, krona_layers, merge_beneath_others, terms_to_merge, undone_on_error
from .layer import KronAConv2d, KronALayer, KronALinear, krona_layer_in
from .names import FACTORS, PREFIX, factor_name, layer_of, unwrapped_name
from .parts import give_parts_base_names
from .projections import bring_to_fused
from .targets import layer_factors, layer_scale, layer_terms, settle_targets
from .weighted import Combination, weighted_sum

BASE_ALONE = "__base__"
"""PEFT's word for a sample without an adapter."""


class KronAModel(BaseTuner):
    """PEFT's injector for Kronecker adapters. `get_peft_model`, `unet.add_adapter` and their kin make it.

    Injection is all or nothing: all targeted layers are checked first, and the error names those that misfit.

    Args:
        model: what the adapter goes into.
        peft_config: its config.
        adapter_name: what to call it.
        *args: for PEFT.
        factors: by name, `<layer>.krona_A` and so on, the factors to begin with, of the shapes that the config means;
            by default they start as the config says.
        **kwargs: for PEFT.

    Raises:
        AdapterNameError: the model already has a Kronecker adapter of that name.
        FactorShapeError: a targeted layer is not linear or its size is not divisible by its factors.
    """

    prefix = PREFIX
    tuner_layer_cls = KronALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (as PEFT declares it)

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        *args: Any,
        factors: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        self._factors = factors
        if any(adapter_name in layer.krona_A for layer in krona_layers(model).values()):
            raise AdapterNameError(
                f"The {type(model).__name__} already has an adapter named {adapter_name!r}; choose another name."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the adapter into every layer that its config, or else the given state dict, names."""
        with self.injecting(self.peft_config[adapter_name], model, adapter_name, state_dict):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    @staticmethod
    @contextmanager
    def injecting(
        config: KronAConfig, model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Settle what a config targets before the block injects it; where the block fails, undo it."""
        with undone_on_error([model], adapter_name):
            settle_targets(config, model, None if state_dict is None else {layer_of(key) for key in state_dict})
            yield
            bring_to_fused(model)
            give_parts_base_names(model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to give each sample its own adapter: `model(x, adapter_names=["one", "__base__", …])`."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if unknown := sorted({name for name in names if name not in self.peft_config} - {BASE_ALONE}):
            raise AdapterNameError(f"adapter_names has {', '.join(map(repr, unknown))}, which no adapter is named.")
        if torch.is_grad_enabled() and any(getattr(part, "gradient_checkpointing", False) for part in self.modules()):
            raise BatchError(
                "adapter_names does not last until the backward pass, where gradient checkpointing computes anew: turn "
                "that off, or use krona_batch."
            )
        chosen = [None if name == BASE_ALONE else name for name in names]
        rows = len(chosen) * (kwargs.get("num_beams") or 1)  # a sample's beams follow each other
        with adapters_by_sample(self.model, Batch(chosen, images=rows)):
            yield

    @staticmethod
    def check_mergeable(model: nn.Module, adapter_names: list[str] | None = None) -> None:
        """Raise `MergeError` if some weight cannot hold these adapters, by default the active ones."""
        terms_to_merge(krona_layers(model), adapter_names)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with adapters, by default the active ones, in its weights for good.

        Adapters of other methods on the same layers are merged, too.

        Raises:
            MergeError: some weight would not be finite, or is quantized. Nothing has changed then.
        """
        planned = terms_to_merge(krona_layers(self.model), adapter_names)
        merge_beneath_others(self.model, safe_merge, adapter_names)
        for layer, terms in planned:
            layer.fold(terms)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of every layer; where it was active, another one becomes active.

        Raises:
            ValueError: there is none of that name, or it is merged.
        """
        was_active, layers = adapter_name in self.active_adapters, krona_layers(self.model).values()
        super().delete_adapter(adapter_name)
        # PEFT passes over layers that have its prefix in their names, and lets each choose what is active next.
        for layer in layers:
            layer.delete_adapter(adapter_name)
        if was_active:
            self.active_adapter = self.active_adapters or next(iter(layers)).active_adapters
            for layer in layers:
                layer.set_adapter(self.active_adapters)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Combination = "cat",
        num_terms: int | None = None,
    ) -> float:
        """Add an adapter that is Σ w · ΔW of others. It is not made active.

        With "cat" the sum is exact, in as many terms as the others have together: each term keeps its B, and its A is
        multiplied by w and by the scale in force. Where all B are products, they stay such. A layer that some adapters
        lack has terms of zeros for them. With "svd" it is the nearest with fewer terms, see `approximate`.

        Args:
            adapters: the names of KronA adapters of one layout; for "cat" with the same (a1, a2) in each layer.
            weights: w of each, of either sign.
            adapter_name: what to call the sum. Its alpha is 1, and the rest of its config the first adapter's.
                Modules that one adapter trains in full are copied as they are.
            combination_type: "cat" or "svd".
            num_terms: how many terms "svd" leaves; by default the first adapter's.

        Returns:
            ‖Σ w · ΔW − the new ΔW‖ / ‖Σ w · ΔW‖ over all layers, which for "cat" is 0.

        Raises:
            AdapterNameError: the name is taken, or one of the others is unknown.
            ConfigError: no adapters, another number of weights, another combination, two layouts, or two adapters with
                copies of one module.
            FactorShapeError: two adapters have different (a1, a2) in a layer. Whatever the error, nothing has changed.
        """
        total = weighted_sum(self.model, self.peft_config, adapter_name, adapters, weights, combination_type, num_terms)
        with undone_on_error([self.model], adapter_name):
            self.peft_config[adapter_name] = total.config
            self.inject_adapter(self.model, adapter_name)
            return total.write(self.model, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's own makes parameters that were frozen trainable, and leaves fp32 ones where it should not autocast.
        for layer in krona_layers(self.model).values():
            layer.cast_factors(adapter_name, to_base=not autocast_adapter_dtype)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # A saved name says nothing of adapters around the layer or of torch.compile, so it fits a model without them.
        saved: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return unwrapped_name(saved)

    def _create_and_replace(
        self,
        config: KronAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = krona_layer_in(target)  # also under other layers: two could not both merge into one weight
        if layer is None:
            layer = _layer_around(target)
            # A new module starts in training mode, where dropout acts.
            layer.training = target.training
            # PEFT moves factors to the base's weight, which offloading puts nowhere: so they come afterwards.
            self._replace_module(parent, target_name, layer, target)
        a1, a2 = layer_factors(config, current_key, layer.out_features)
        layer.update_layer(
            adapter_name,
            a1,
            a2,
            num_terms=layer_terms(config, current_key),
            b_rank=config.b_rank,
            layout=config.layout,
            alpha=layer_scale(config, current_key),
            dropout=config.dropout,
            init_a=config.init_a if config.init_weights else "normal",
            init_b=config.init_b if config.init_weights else "normal",
            inference_mode=config.inference_mode,
            factors=_factors_of(current_key, getattr(self, "_factors", None)),  # a mixed model has none
        )


def _factors_of(layer_name: str, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    if tensors is None:
        return None
    named = {factor: factor_name(unwrapped_name(layer_name), factor) for factor in FACTORS}
    return {factor: tensors[name] for factor, name in named.items() if name in tensors}


def _layer_around(target: nn.Module) -> KronALayer:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return KronAConv2d(target) if isinstance(base, nn.Conv2d) else KronALinear(target)


enter_in_peft(KronAPeftType.KRONA, KronAConfig, KronAModel, PREFIX)
