"""LoRA-DreamBooth: ΔW = s · B·A of a low rank, by PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import LoraConfig, PeftConfig

from diffusekrona.kron.shapes import lora_parameters

from .peft_method import PeftMethod


@dataclass(frozen=True)
class LoRA(PeftMethod):
    """The paper's main rival (Hu et al., 2022). What it saves, Diffusers' `pipe.load_lora_weights` reads, too.

    A starts normal with standard deviation 1/rank and B zero, as in Diffusers' own scripts, which the paper used.
    For files that others read the scale has to be 1: they do not hold alpha.
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
