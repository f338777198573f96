"""What the methods have in common that PEFT itself brings: LoRA, LoKr, LoHa."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from peft import PeftConfig, inject_adapter_in_model
from torch import nn

from diffusekrona.errors import ConfigError
from diffusekrona.kron.exact import arithmetic_dtype
from diffusekrona.tuner.compat import BaseTunerLayer
from diffusekrona.tuner.components import mark_adapted
from diffusekrona.tuner.config import ATTENTION, KronAConfig
from diffusekrona.tuner.layer import layer_size
from diffusekrona.tuner.targets import resolved, target_layers

from .method import Method, MethodError, check_scale, check_whole

_ADAPTER = "default"


@dataclass(frozen=True)
class PeftMethod(Method):
    """One of PEFT's adapters in every linear layer that `targets` names.

    Attributes:
        prefix: what PEFT's names of the adapter's tensors start with.
        needs_rank: whether it is of a low rank in any case.
        alpha: the update's scale times the rank, as PEFT has it; None is the rank, for a scale of 1.
        targets: a word or a regular expression, as `KronAConfig.target_modules` takes it.

    Raises:
        MethodError: a value that no layer could use.
    """

    prefix: ClassVar[str]
    needs_rank: ClassVar[bool] = True

    rank: int | None = 4
    alpha: float | None = None
    targets: str = ATTENTION

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.needs_rank or self.rank is not None:
            check_whole("rank", self.rank)
        if self.alpha is not None:
            check_scale("alpha", self.alpha)
        try:
            KronAConfig(target_modules=self.targets)
        except ConfigError as error:
            raise MethodError(str(error).replace("target_modules", "targets")) from error

    @abstractmethod
    def _config(self, targets: str | list[str]) -> PeftConfig:
        """PEFT's own configuration."""

    @abstractmethod
    def _parameters_of(self, d: int, h: int) -> int:
        """How many numbers train in a layer of d outputs and h inputs."""

    def _layers(self, component: nn.Module) -> dict[str, nn.Module]:
        layers = target_layers(component, KronAConfig(target_modules=self.targets))
        others = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
        if not layers or others:
            what = f"{others[0]} is no linear layer" if others else "no layer is named so"
            raise MethodError(
                f"targets {self.targets!r} does not suit the {type(component).__name__}: {what}. Use attention, "
                "attention+ff, or a regular expression for names of linear layers."
            )
        return layers

    def _count(self, component: nn.Module) -> int:
        sizes = map(layer_size, self._layers(component).values())
        return sum(self._parameters_of(d, h) for d, h, _ in sizes)

    def _install(self, component: nn.Module) -> None:
        self._layers(component)
        names = resolved(KronAConfig(target_modules=self.targets), component).target_modules
        assert names is not None
        config = self._config(names if isinstance(names, str) else sorted(names))
        inject_adapter_in_model(config, component, _ADAPTER)
        mark_adapted(component)
        for parameter in self._trained(component).values():
            parameter.data = parameter.data.to(arithmetic_dtype(parameter.dtype))

    def _trained(self, component: nn.Module) -> dict[str, nn.Parameter]:
        # In files PEFT and Diffusers leave the adapter's name out.
        return {
            name.replace(f".{_ADAPTER}", "", 1): parameter
            for name, parameter in component.named_parameters()
            if f".{self.prefix}" in name
        }

    def _take_out(self, component: nn.Module) -> None:
        for name, layer in list(component.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(component.get_submodule(parent), child, layer.get_base_layer())
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            vars(component).pop(attribute, None)
