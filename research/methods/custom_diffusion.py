"""Custom Diffusion: the K and V weights of cross-attention, where the prompt enters the denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from diffusekrona.errors import ConfigError
from diffusekrona.tuner.config import KronAConfig
from diffusekrona.tuner.targets import target_layers

from .in_place import copies_of, copy_in_place, float32_inside, put_back
from .method import Method, MethodError


@dataclass(frozen=True)
class CustomDiffusion(Method):
    """K and V of cross-attention, whole (Kumari et al., 2023).

    Left out, so that all methods learn from the same images and prompts: the new word, whose embedding the original
    learns beside these weights (a rare word that there is takes its place), and the real images of the class that it
    retrieves (`fit` takes class images for any method).
    """

    name: ClassVar[str] = "custom-diffusion"
    label: ClassVar[str] = "Custom Diffusion"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_encoders:
            raise MethodError(
                "text_encoders must be False for custom-diffusion: text encoders have no cross-attention."
            )

    def _layers(self, component: nn.Module) -> dict[str, nn.Module]:
        try:
            found = target_layers(component, KronAConfig(target_modules="cross-attention"))
        except ConfigError as error:
            raise MethodError(
                f"custom-diffusion trains K and V of cross-attention, and the {type(component).__name__} has none that "
                "Diffusers marks as such; use a Stable Diffusion 1.x, 2.x or SDXL base, or another method."
            ) from error
        return {name: layer for name, layer in found.items() if name.endswith((".to_k", ".to_v"))}

    def _count(self, component: nn.Module) -> int:
        return sum(p.numel() for layer in self._layers(component).values() for p in layer.parameters())

    def _install(self, component: nn.Module) -> None:
        layers = self._layers(component)
        dtypes = {name: next(layer.parameters()).dtype for name, layer in layers.items()}
        copy_in_place(
            component,
            [f"{layer}.{name}" for layer, module in layers.items() for name, _ in module.named_parameters()],
        )
        for name, layer in layers.items():
            float32_inside(component, layer, dtypes[name])

    def _trained(self, component: nn.Module) -> dict[str, nn.Parameter]:
        return copies_of(component)

    def _take_out(self, component: nn.Module) -> None:
        put_back(component)
