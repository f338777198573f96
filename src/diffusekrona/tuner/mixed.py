"""KronAMixedModel: KronA among the methods of PEFT's mixed models."""

from __future__ import annotations

from typing import Any

import peft.mapping
import peft.mixed_model
import peft.tuners.mixed
from peft.tuners.mixed.model import PREFIXES, MixedModel
from peft.tuners.tuners_utils import set_adapter
from torch import Tensor, nn

from .config import KronAConfig, KronAPeftType
from .injected import krona_layers, terms_to_merge, undone_on_error
from .layer import KronALayer
from .model import KronAModel, layer_names
from .targets import settle_targets


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
            settle_targets(self.peft_config[adapter_name], model, layer_names(state_dict))
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


def _register() -> None:
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
