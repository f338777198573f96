"""LoKr: ΔW = s · w1 ⊗ w2 with one factor for both sides, w2 of a low rank or whole, by PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import LoKrConfig, PeftConfig

from diffusekrona.kron.shapes import lokr_parameters

from .method import MethodError
from .peft_method import PeftMethod

_WHOLE = 1 << 20
"""A rank above which no side of a w2 is; PEFT then keeps w2 whole."""


@dataclass(frozen=True)
class LoKr(PeftMethod):
    """LyCORIS' Kronecker adapter (Yeh et al., 2023), as Appendix F compares it.

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
