"""Prompts as the denoiser wants them: by frozen encoders once for each prompt, by trained ones in every step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .encoded import Encoded, Keep, fingerprint
from .families import Family


class Texts:
    """The encoded prompts of any choice of training images.

    Args:
        family: of the pipeline.
        prompts: all that will be asked for.
        encoders: the pipeline's text encoders.
        trained: whether gradients have to reach them, which takes them in every step.
        device: where they run; frozen ones go to the CPU afterwards unless they have to run in each step.
        keep: where what frozen ones say stays.
        folder: of its files, for "disk".
    """

    def __init__(
        self,
        family: Family,
        prompts: Iterable[str],
        encoders: Sequence[nn.Module],
        *,
        trained: bool,
        device: torch.device,
        keep: Keep = "memory",
        folder: Path | None = None,
    ) -> None:
        self._family, self._device, self._trained = family, device, trained
        model = fingerprint(encoders) if keep == "disk" and not trained else ""
        keep = "none" if trained else keep
        self._kept = Encoded(self._encode_one, keep, folder, lambda text: f"text-{model}-{_mark_of_text(text)}")
        for encoder in encoders:
            encoder.to(device)
        self._kept.prepare(dict.fromkeys(prompts))
        if keep != "none":
            for encoder in encoders:
                encoder.to("cpu")

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What `Family.encode` says of these prompts, in this order and in the denoiser's dtype."""
        distinct = list(dict.fromkeys(prompts))
        if self._trained:
            tensors = self._family.encode(distinct, self._device)
        else:
            each = [self._kept[prompt] for prompt in distinct]
            tensors = {name: torch.stack([one[name] for one in each]).to(self._device) for name in each[0]}
        rows = [distinct.index(prompt) for prompt in prompts]
        return {name: tensor.to(self._family.dtype)[rows] for name, tensor in tensors.items()}

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self._family.encode([prompt], self._device).items()}


def _mark_of_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
