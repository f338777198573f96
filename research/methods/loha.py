"""LoHa: ΔW = s · (B1·A1) ∘ (B2·A2), the Hadamard product of two updates of a low rank, by PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import LoHaConfig, PeftConfig

from diffusekrona.kron.shapes import loha_parameters

from .peft_method import PeftMethod


@dataclass(frozen=True)
class LoHa(PeftMethod):
    """LyCORIS' Hadamard adapter (Yeh et al., 2023), as Appendix F compares it."""

    name: ClassVar[str] = "loha"
    label: ClassVar[str] = "LoHa"
    prefix: ClassVar[str] = "hada_"

    def _config(self, targets: str | list[str]) -> PeftConfig:
        assert self.rank is not None
        alpha = self.rank if self.alpha is None else self.alpha
        return LoHaConfig(r=self.rank, alpha=alpha, target_modules=targets)  # type: ignore[arg-type]

    def _parameters_of(self, d: int, h: int) -> int:
        return loha_parameters(d, h, self.rank or 0)
