"""KronAModel: puts KronALayers into a model as a KronAConfig says. A PEFT tuner, entered in PEFT's tables."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft.mapping
import peft.mixed_model
import peft.tuners.mixed
from peft.tuners.mixed.model import PREFIXES, MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers, set_adapter
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn

from .config import KronAConfig, KronAPeftType
from .conv import KronAConv2d
from .errors import AdapterNameError, ConfigError, FactorShapeError, KronAError
from .factors import UpdateShapes, factor_shapes, update_shapes
from .injected import krona_layers, merge_beneath_others, terms_to_merge, undone_on_error
from .layer import KronALayer, KronALinear, layer_size
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
            _prepare(self.peft_config[adapter_name], model, state_dict)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with adapters, by default the active ones, in its weights for good.

        Adapters of other methods on the same layers are merged, too.

        Raises:
            MergeError: some weight would not be finite, or is quantized. Nothing has changed then.
        """
        terms_to_merge(krona_layers(self.model), adapter_names)
        merge_beneath_others(self.model, safe_merge, adapter_names)
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
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an adapter that is Σ w · ΔW of others, with as many terms as they have together. It is not made active.

        The sum is exact: each term keeps its B, and its A is multiplied by w and by the scale in force. Where all B
        are products, they stay such. A layer that some adapters lack has terms of zeros for them.

        Args:
            adapters: the names of KronA adapters; a layer that several have, has the same (a1, a2) and layout in them.
            weights: w of each, of either sign.
            adapter_name: what to call the sum. Its alpha is 1, and the rest of its config the first adapter's.
                Modules that one adapter trains in full are copied as they are.
            combination_type: "cat", for lack of others.

        Raises:
            AdapterNameError: the name is taken, or one of the others is unknown.
            ConfigError: no adapters, another number of weights, another combination, two layouts, or two adapters with
                copies of one module.
            FactorShapeError: two adapters have different (a1, a2) in a layer. Whatever the error, nothing has changed.
        """
        if combination_type != "cat":
            raise ConfigError(
                f"combination_type must be 'cat', the exact sum in the terms of all adapters, not {combination_type!r}."
            )
        summands = _summands(self.model, adapters, weights, self.peft_config, adapter_name)
        layers = {
            name.replace(".base_layer", ""): layer
            for name, layer in krona_layers(self.model).items()
            if any(adapter in layer.krona_A for adapter in adapters)
        }
        config = _sum_config(
            self.model, _common_factors(layers, adapters), [self.peft_config[name] for name in adapters]
        )
        with undone_on_error([self.model], adapter_name):
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            for layer in layers.values():
                layer.set_weighted_sum(adapter_name, summands)
            for copies in _copied_modules(self.model, adapters):
                trained = next(copies[name] for name in adapters if name in copies)
                copies[adapter_name].load_state_dict(trained.state_dict())

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's own makes parameters that were frozen trainable, and leaves fp32 ones where it should not autocast.
        for layer in krona_layers(self.model).values():
            layer.cast_factors(adapter_name, to_base=not autocast_adapter_dtype)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # A saved name says nothing of adapters around the layer or of torch.compile, so it fits a model without them.
        saved: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return saved.replace(".base_layer.", ".").replace("_orig_mod.", "")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:  # PEFT would ignore it
            raise KronAError(
                "adapter_names, which gives each sample of a batch an adapter of its own, is not supported by KronA; "
                "call the model once for each adapter, made active by set_adapter."
            )
        yield

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
        layer = _existing_layer(target)
        if layer is None:
            layer = _layer_around(target)
            # A new module starts in training mode, where dropout acts.
            layer.training = target.training
            # PEFT moves factors to the base's weight, which offloading puts nowhere: so they come afterwards.
            self._replace_module(parent, target_name, layer, target)
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


class KronAMixedModel(MixedModel):
    """PEFT's model of adapters of several methods, `get_peft_model(…, mixed=True)`, with KronA among them."""

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter into every layer that its config, or else the given state dict, names."""
        arguments = (model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if not isinstance(self.peft_config[adapter_name], KronAConfig):
            super().inject_adapter(*arguments)
            return
        with undone_on_error([model], adapter_name):
            _prepare(self.peft_config[adapter_name], model, state_dict)
            super().inject_adapter(*arguments)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several, of any methods, the active ones."""
        super().set_adapter(adapter_name, inference_mode)
        set_adapter(self.model, adapter_name, inference_mode, layer_cls=KronALayer)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with adapters of all methods, by default the active ones, in its weights for good.

        Raises:
            MergeError: a KronA adapter would make some weight not finite, or meets a quantized one. Nothing has
                changed then.
        """
        terms_to_merge(krona_layers(self.model), adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _check_new_adapter_config(self, config: Any) -> None:
        if not isinstance(config, KronAConfig):
            super()._check_new_adapter_config(config)

    def _create_and_replace(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        arguments = (config, adapter_name, target, target_name, parent, current_key)
        if isinstance(config, KronAConfig):
            create: Any = KronAModel._create_and_replace
            create(self, *arguments)
        else:
            super()._create_and_replace(*arguments)


def _prepare(config: KronAConfig, model: nn.Module, state_dict: dict[str, Tensor] | None) -> None:
    """Write into a config what its words mean in a model, and raise `FactorShapeError` unless every layer fits."""
    config.target_modules = resolved(config, model).target_modules
    config = _maybe_include_all_linear_layers(config, model)
    targets = target_layers(model, config)
    if state_dict is not None:
        named = {key.removeprefix("_orig_mod.").rpartition(f".{KronAModel.prefix}")[0] for key in state_dict}
        targets = {name: layer for name, layer in targets.items() if name.removeprefix("_orig_mod.") in named}
    problems = {}
    for name, layer in targets.items():
        try:
            layer_shapes(config, name, layer)
        except FactorShapeError as error:
            problems[name] = str(error)
    if problems:
        raise FactorShapeError(_describe(problems))
    _warn_unmatched(config, list(targets))


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
    return KronAConv2d(target) if isinstance(base, nn.Conv2d) else KronALinear(target)


def _existing_layer(target: nn.Module) -> KronALayer | None:
    """The KronALayer of a target, itself or under other layers: two could not both merge into one weight."""
    layer: Any = target
    while layer is not None and not isinstance(layer, KronALayer):
        layer = getattr(layer, "base_layer", None)
    return layer


def _summands(
    model: nn.Module, adapters: list[str], weights: list[float], configs: Mapping[str, Any], adapter_name: str
) -> list[tuple[str, float]]:
    """The adapters of a weighted sum with their weights, all checked but their shapes."""
    if adapter_name in configs:
        raise AdapterNameError(f"There is an adapter named {adapter_name!r} already; give the sum another name.")
    known = [name for name, config in configs.items() if isinstance(config, KronAConfig)]
    unknown = [name for name in adapters if name not in known]
    if unknown:
        raise AdapterNameError(f"No KronA adapter is named {unknown[0]!r}; there are: {', '.join(known)}.")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"A weighted sum needs adapters and as many weights, not {len(adapters)} and {len(weights)}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"The weights of a sum must be finite numbers, not {weights!r}.")
    if len({configs[name].layout for name in adapters}) > 1:
        raise ConfigError("Adapters of different layouts have no sum that is one adapter.")
    for copies in _copied_modules(model, adapters):
        trained = [name for name in dict.fromkeys(adapters) if name in copies]
        if len(trained) > 1:
            raise ConfigError(
                f"The adapters {' and '.join(map(repr, trained))} have a module in modules_to_save in common, and "
                "modules that are trained in full have no sum."
            )
    return list(zip(adapters, map(float, weights), strict=True))


def _copied_modules(model: nn.Module, adapters: list[str]) -> list[nn.ModuleDict]:
    """For each module that one of the adapters trains in full: adapter name → its copy."""
    wrappers = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    return [one.modules_to_save for one in wrappers if any(name in one.modules_to_save for name in adapters)]


def _common_factors(layers: Mapping[str, KronALayer], adapters: list[str]) -> dict[str, tuple[int, int]]:
    """(a1, a2) of each layer, the same in all adapters that it has."""
    pairs: dict[str, tuple[int, int]] = {}
    problems = {}
    for name, layer in layers.items():
        found = {one: layer.shapes(one).factors[:2] for one in dict.fromkeys(adapters) if one in layer.krona_A}
        pairs[name] = next(iter(found.values()))
        if len(set(found.values())) > 1:
            problems[name] = ", ".join(f"{pair} in {one!r}" for one, pair in found.items())
    if problems:
        raise FactorShapeError(
            f"{len(problems)} layer(s) have other factors (a1, a2) in one adapter than in another, so the sum is no "
            f"KronA adapter; nothing was changed.{_listed(problems)}"
        )
    return pairs


def _sum_config(model: nn.Module, shapes: Mapping[str, tuple[int, int]], configs: list[KronAConfig]) -> KronAConfig:
    """The config of a sum of adapters that has these layers with this (a1, a2) each."""
    config = copy.deepcopy(configs[0])
    config.num_terms = sum(one.num_terms for one in configs)
    ranks = [one.b_rank for one in configs if one.b_rank is not None]
    config.b_rank = max(ranks) if len(ranks) == len(configs) else None
    config.alpha, config.alpha_pattern = 1.0, {}
    modules = dict.fromkeys(name for one in configs for name in one.modules_to_save or ())
    config.modules_to_save = list(modules) or None
    if any(layer_factors(config, name) != pair for name, pair in shapes.items()):
        (config.a1, config.a2), config.factor_pattern = _patterns(shapes)
    if target_layers(model, config).keys() != shapes.keys():
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.target_modules = set(shapes)
    if target_layers(model, config).keys() != shapes.keys():  # a name may end as another one does
        config.target_modules = "|".join(map(re.escape, shapes))
    return config


def _patterns(shapes: Mapping[str, tuple[int, int]]) -> tuple[tuple[int, int], dict[str, tuple[int, int]]]:
    """The commonest (a1, a2), and a `factor_pattern` for the other layers."""
    common = Counter(shapes.values()).most_common(1)[0][0]
    others = [name for name, pair in shapes.items() if pair != common]
    # The first match counts, and a name matches all that end as it does: the longest come first.
    listed = [name for name in shapes if name in others or name.endswith(tuple(f".{other}" for other in others))]
    return common, {re.escape(name): shapes[name] for name in sorted(listed, key=len, reverse=True)}


def _describe(problems: dict[str, str]) -> str:
    return (
        f"{len(problems)} targeted layer(s) cannot take these factors; nothing was changed.{_listed(problems)}\n"
        "Choose other factors for them with factor_pattern={'name or regular expression': (a1, a2)}, "
        "or leave them out with exclude_modules."
    )


def _listed(problems: dict[str, str], shown: int = 3) -> str:
    listed = "".join(f"\n  {name}: {problem}." for name, problem in list(problems.items())[:shown])
    more = f"\n  and {len(problems) - shown} more." if len(problems) > shown else ""
    return listed + more


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
    _register_mixed()


def _register_mixed() -> None:
    # What PeftMixedModel accepts is a tuple, and what it makes a class that knows its methods by heart, so both have to
    # be replaced; for other methods ours does what PEFT's does.
    tables: Any = peft.mapping
    tables.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[KronAPeftType.KRONA] = KronAMixedModel
    mixed: Any = peft.tuners.mixed
    mixed.COMPATIBLE_TUNER_TYPES = (*mixed.COMPATIBLE_TUNER_TYPES, KronAPeftType.KRONA)
    PREFIXES.extend(KronAModel.prefix + factor for factor in "AB")  # looked for anywhere in names
    maker: Any = peft.mixed_model
    maker.MixedModel = KronAMixedModel


_register()
