"""Full DreamBooth: every weight of the denoiser, and of the text encoders if asked, is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .in_place import copies_of, copy_in_place, float32_inside, put_back
from .method import Method


@dataclass(frozen=True)
class FullDreamBooth(Method):
    """All weights (Ruiz et al., 2023). Trained in float32; the base's own stay in memory, for `remove`."""

    name: ClassVar[str] = "dreambooth"
    label: ClassVar[str] = "DreamBooth"

    def _count(self, component: nn.Module) -> int:
        return sum(parameter.numel() for parameter in component.parameters())

    def _install(self, component: nn.Module) -> None:
        dtype = next(parameter.dtype for parameter in component.parameters() if parameter.is_floating_point())
        copy_in_place(component, [name for name, _ in component.named_parameters(remove_duplicate=False)])
        float32_inside(component, component, dtype)

    def _trained(self, component: nn.Module) -> dict[str, nn.Parameter]:
        return copies_of(component)

    def _take_out(self, component: nn.Module) -> None:
        put_back(component)
