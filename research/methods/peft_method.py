"""The methods that PEFT itself brings: LoRA, LoKr and LoHa."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn

from diffusekrona.errors import ConfigError
from diffusekrona.kron.exact import arithmetic_dtype
from diffusekrona.kron.shapes import loha_parameters, lokr_parameters, lora_parameters
from diffusekrona.tuner.compat import BaseTunerLayer
from diffusekrona.tuner.components import mark_adapted
from diffusekrona.tuner.config import KronAConfig
from diffusekrona.tuner.fields import ATTENTION
from diffusekrona.tuner.layer import layer_size
from diffusekrona.tuner.targets import resolved, target_layers

from .method import Method, MethodError, check_scale, check_whole

_ADAPTER = "default"

_WHOLE = 1 << 20
"""A rank above every side of w2, for which PEFT keeps w2 whole."""


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
        """Number of trained parameters in a layer of d outputs and h inputs."""

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


@dataclass(frozen=True)
class LoRA(PeftMethod):
    """LoRA-DreamBooth: ΔW = s · B·A of a low rank (Hu et al., 2022), the paper's main rival.

    Diffusers' `pipe.load_lora_weights` reads its files, too. They do not hold alpha, so the scale has to be 1 for them.
    A starts normal with standard deviation 1/rank and B zero, as in Diffusers' own scripts, which the paper used.
    """

    name: ClassVar[str] = "lora"
    label: ClassVar[str] = "LoRA-DreamBooth"
    file_name: ClassVar[str] = "pytorch_lora_weights.safetensors"
    prefix: ClassVar[str] = "lora_"

    def _config(self, targets: str | list[str]) -> PeftConfig:
        assert self.rank is not None
        alpha = self.rank if self.alpha is None else self.alpha
        # PEFT declares alpha as a whole number and only divides it.
        return LoraConfig(
            r=self.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=targets,
            init_lora_weights="gaussian",
        )

    def _parameters_of(self, d: int, h: int) -> int:
        return lora_parameters(d, h, self.rank or 0)


@dataclass(frozen=True)
class LoKr(PeftMethod):
    """ΔW = s · w1 ⊗ w2 with one factor for both sides of w1, w2 of a low rank or whole (Yeh et al., 2023; Appendix F).

    Attributes:
        factor: the size of w1 on either side, where it divides the layer's; −1 for the most square split.
        rank: of w2 = w2_a · w2_b, wherever that has fewer numbers; None keeps w2 whole.
    """

    name: ClassVar[str] = "lokr"
    label: ClassVar[str] = "LoKr"
    prefix: ClassVar[str] = "lokr_"
    needs_rank: ClassVar[bool] = False

    rank: int | None = None
    factor: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.factor, int) or isinstance(self.factor, bool) or (self.factor < 1 and self.factor != -1):
            raise MethodError(f"factor must be a whole number of at least 1, or -1, not {self.factor!r}.")

    def _config(self, targets: str | list[str]) -> PeftConfig:
        rank = self.rank or _WHOLE
        scale = 1.0 if self.alpha is None else self.alpha / (self.rank or 1)
        return LoKrConfig(
            r=rank,
            alpha=scale * rank,  # type: ignore[arg-type]
            target_modules=targets,
            decompose_factor=self.factor,
        )

    def _parameters_of(self, d: int, h: int) -> int:
        return lokr_parameters(d, h, self.rank, self.factor)


@dataclass(frozen=True)
class LoHa(PeftMethod):
    """ΔW = s · (B1·A1) ∘ (B2·A2), the Hadamard product of two updates of a low rank (Yeh et al., 2023; Appendix F)."""

    name: ClassVar[str] = "loha"
    label: ClassVar[str] = "LoHa"
    prefix: ClassVar[str] = "hada_"

    def _config(self, targets: str | list[str]) -> PeftConfig:
        assert self.rank is not None
        alpha = self.rank if self.alpha is None else self.alpha
        return LoHaConfig(r=self.rank, alpha=alpha, target_modules=targets)  # type: ignore[arg-type]

    def _parameters_of(self, d: int, h: int) -> int:
        return loha_parameters(d, h, self.rank or 0)
