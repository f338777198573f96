"""DiffuseKronA, of one term or of several: ΔW = s · Σ A_r ⊗ B_r."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import nn

from diffusekrona.errors import ConfigError
from diffusekrona.files.formats.krona import header_of
from diffusekrona.pipeline import inject_krona, unload_krona
from diffusekrona.tuner.config import KronAConfig
from diffusekrona.tuner.fields import ATTENTION, Init, Scaling
from diffusekrona.tuner.injected import adapter_tensors
from diffusekrona.tuner.targets import layer_shapes, target_layers

from .method import Method, MethodError

_ADAPTER = "default"


@dataclass(frozen=True)
class KronA(Method):
    """The paper's method; options as in `KronAConfig`. `load_krona` reads its files, too.

    Raises:
        MethodError: a value that no layer could use.
    """

    name: ClassVar[str] = "krona"
    label: ClassVar[str] = "DiffuseKronA"
    file_name: ClassVar[str] = "krona.safetensors"

    a1: int | None = None
    a2: int = 64
    b1: int | None = None
    num_terms: int = 1
    alpha: float = 1.0
    scaling: Scaling = "alpha"
    targets: str = ATTENTION
    factor_pattern: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)
    init_a: Init = "normal"
    init_b: Init = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            object.__setattr__(self, "factor_pattern", self._config().factor_pattern)  # as tuples
        except ConfigError as error:
            raise MethodError(str(error)) from error

    def _config(self) -> KronAConfig:
        options: dict[str, Any] = asdict(self)
        del options["text_encoders"]
        return KronAConfig(target_modules=options.pop("targets"), **options)

    def _count(self, component: nn.Module) -> int:
        config = self._config()
        layers = target_layers(component, config)
        return sum(layer_shapes(config, name, layer).parameters for name, layer in layers.items())

    def _install(self, component: nn.Module) -> None:
        inject_krona(component, self._config(), _ADAPTER)

    def _trained(self, component: nn.Module) -> dict[str, nn.Parameter]:
        tensors = adapter_tensors(component, _ADAPTER)
        return {key: tensor for key, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}

    def _take_out(self, component: nn.Module) -> None:
        unload_krona(component)

    def _header(self, components: Mapping[str, nn.Module]) -> dict[str, str]:
        configs = {}
        for part, component in components.items():
            held: Any = component.peft_config
            configs[part] = copy.deepcopy(held[_ADAPTER])
            configs[part].inference_mode = True
        return header_of(configs)
