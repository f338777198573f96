"""KronAModel: puts KronALayers into a model as a KronAConfig says. A PEFT tuner, entered in PEFT's tables."""

from __future__ import annotations

import re
import warnings
from typing import Any

import peft.mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .config import KronAConfig, KronAPeftType
from .conv import KronAConv2d
from .errors import AdapterNameError, FactorShapeError
from .factors import UpdateShapes, factor_shapes, update_shapes
from .injected import krona_layers, terms_to_merge, undone_on_error
from .layer import KronALayer, layer_size
from .presets import resolved


class KronAModel(BaseTuner):
    """PEFT's injector for Kronecker adapters. `get_peft_model`, `unet.add_adapter` and their kin make it.

    Injection is all or nothing: all targeted layers are checked first, and the error names those that misfit.

    Raises:
        AdapterNameError: the model already has a Kronecker adapter of that name.
        FactorShapeError: a targeted layer is not linear or its size is not divisible by its factors.
    """

    prefix = "krona_"
    tuner_layer_cls = KronALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (as PEFT declares it)

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
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
        with undone_on_error([model], adapter_name):
            config = self.peft_config[adapter_name]
            config.target_modules = resolved(config, model).target_modules
            self._check_layers(model, config, state_dict)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with adapters, by default the active ones, in its weights for good.

        Raises:
            MergeError: some weight would not be finite, or is quantized. Nothing has changed then.
        """
        terms_to_merge(krona_layers(self.model), adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _check_layers(self, model: nn.Module, config: KronAConfig, state_dict: dict[str, Tensor] | None) -> None:
        config = _maybe_include_all_linear_layers(config, model)
        targets = target_layers(model, config)
        if state_dict is not None:
            targets = {name: layer for name, layer in targets.items() if f"{name}.{self.prefix}A" in state_dict}
        problems = {}
        for name, layer in targets.items():
            try:
                layer_shapes(config, name, layer)
            except FactorShapeError as error:
                problems[name] = str(error)
        if problems:
            raise FactorShapeError(_describe(problems))
        _warn_unmatched(config, list(targets))

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
        existing = _existing_layer(target)
        layer = existing or _layer_around(target)
        a1, a2 = layer_factors(config, current_key)
        layer.update_layer(
            adapter_name,
            a1,
            a2,
            num_terms=config.num_terms,
            b_rank=config.b_rank,
            layout=config.layout,
            alpha=layer_alpha(config, current_key),
            dropout=config.dropout,
            init_a=config.init_a if config.init_weights else "normal",
            init_b=config.init_b if config.init_weights else "normal",
            inference_mode=config.inference_mode,
        )
        if existing is None:
            # A new module starts in training mode, where dropout acts.
            layer.training = target.training
            self._replace_module(parent, target_name, layer, target)


def layer_factors(config: KronAConfig, layer_name: str) -> tuple[int, int]:
    """(a1, a2) of a layer: the first match in `factor_pattern`, else the config's own."""
    key = get_pattern_key(list(config.factor_pattern), layer_name)
    return config.factor_pattern.get(key, (config.a1, config.a2))


def layer_alpha(config: KronAConfig, layer_name: str) -> float:
    """Alpha of a layer: the first match in `alpha_pattern`, else the config's own."""
    return config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), layer_name), config.alpha)


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
    return update_shapes(
        factor_shapes(d, h, *layer_factors(config, layer_name)), config.num_terms, config.b_rank, kernel
    )


def target_layers(model: nn.Module, config: KronAConfig) -> dict[str, nn.Module]:
    """The layers of a model that a config targets, by dotted name. Other adapters' insides do not count."""
    config = resolved(config, model)
    named = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in named.items() if isinstance(module, BaseTunerLayer))
    return {
        name: module
        for name, module in named.items()
        if name and not name.startswith(inside) and KronAModel._check_target_module_exists(config, name)
    }


def _layer_around(target: nn.Module) -> KronALayer:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return KronAConv2d(target) if isinstance(base, nn.Conv2d) else KronALayer(target)


def _existing_layer(target: nn.Module) -> KronALayer | None:
    """The KronALayer of a target, itself or under other layers: two could not both merge into one weight."""
    layer: Any = target
    while layer is not None and not isinstance(layer, KronALayer):
        layer = getattr(layer, "base_layer", None)
    return layer


def _describe(problems: dict[str, str], shown: int = 3) -> str:
    listed = "".join(f"\n  {name}: {problem}." for name, problem in list(problems.items())[:shown])
    more = f"\n  and {len(problems) - shown} more." if len(problems) > shown else ""
    return (
        f"{len(problems)} targeted layer(s) cannot take these factors; nothing was changed.{listed}{more}\n"
        "Choose other factors for them with factor_pattern={'name or regular expression': (a1, a2)}, "
        "or leave them out with exclude_modules."
    )


def _warn_unmatched(config: KronAConfig, targets: list[str]) -> None:
    for pattern in config.factor_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
            message = f"factor_pattern has {pattern!r}, which matches no targeted layer."
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _register() -> None:
    # PEFT declares these for its own enum; any text that is a key of all three will do.
    tables: Any = peft.mapping
    tables.PEFT_TYPE_TO_CONFIG_MAPPING[KronAPeftType.KRONA] = KronAConfig
    tables.PEFT_TYPE_TO_TUNER_MAPPING[KronAPeftType.KRONA] = KronAModel
    tables.PEFT_TYPE_TO_PREFIX_MAPPING[KronAPeftType.KRONA] = KronAModel.prefix


_register()
