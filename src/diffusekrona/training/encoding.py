"""Images and prompts as frozen encoders give them: computed once for each, or in every step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..errors import AdapterFileError
from ..storage import digest, read_safetensors, safetensors_bytes, write_whole
from .config import Keep
from .families import Family

Key = TypeVar("Key")


class Encoded(Generic[Key]):
    """What an encoder makes of each key.

    Args:
        encode: gives the tensors of a key.
        keep: where they stay.
        folder: of the files, for "disk".
        name: of a key's file; it must tell all that the tensors depend on.
    """

    def __init__(
        self, encode: Callable[[Key], Mapping[str, Tensor]], keep: Keep, folder: Path | None, name: Callable[[Key], str]
    ) -> None:
        self._encode, self._keep, self._folder, self._name = encode, keep, folder, name
        self._in_memory: dict[Key, Mapping[str, Tensor]] = {}

    def prepare(self, keys: Iterable[Key]) -> None:
        """Encode what is to be kept and is not there yet."""
        for key in keys:
            if self._keep == "memory":
                self._in_memory[key] = _on_cpu(self._encode(key))
            elif self._keep == "disk" and not self._is_in_file(key):
                tensors = _on_cpu(self._encode(key))
                write_whole({self._file(key): safetensors_bytes(tensors, {"sha256": digest(tensors)})})

    def __getitem__(self, key: Key) -> Mapping[str, Tensor]:
        """The tensors of a key, on the CPU."""
        if self._keep == "memory":
            return self._in_memory[key]
        return read_safetensors(self._file(key))[0] if self._keep == "disk" else _on_cpu(self._encode(key))

    def _file(self, key: Key) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name(key)}.safetensors"

    def _is_in_file(self, key: Key) -> bool:
        """Whether there is a whole file of a key; a damaged one counts as none."""
        try:
            tensors, metadata = read_safetensors(self._file(key))
        except AdapterFileError:
            return False
        return metadata.get("sha256") == digest(tensors)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def fingerprint(modules: Iterable[nn.Module], settings: str = "") -> str:
    """A hash of all weights of frozen modules and of settings, by which files made with others are told apart."""
    weights = {f"{i}.{name}": _plain(t) for i, module in enumerate(modules) for name, t in module.state_dict().items()}
    return digest(weights, settings)


def _plain(weight: Any) -> Tensor:
    """A quantized weight as the numbers that it stands for; bitsandbytes' is plain, with its scales beside it."""
    plain: Tensor = weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight
    return plain


View = tuple[int, bool]
"""Which image, and whether it is mirrored."""

_SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm_eps")


class LatentPosteriors:
    """Mean and standard deviation of each image's latents, scaled as the denoiser expects them.

    Images with equal pixels are encoded once. With `flip`, each is encoded mirrored as well, and every sample shows it
    either way with equal chance.

    Args:
        family: of the pipeline, whose autoencoder is run in float32, because SDXL's overflows in float16.
        images: RGB.
        flip: whether samples may be mirrored.
        device: where the autoencoder runs; it goes to the CPU afterwards unless it has to run in each step.
        keep: where the posteriors stay.
        folder: of their files, for "disk".
    """

    def __init__(
        self,
        family: Family,
        images: Sequence[Image.Image],
        *,
        flip: bool,
        device: torch.device,
        keep: Keep = "memory",
        folder: Path | None = None,
    ) -> None:
        self._family, self._vae, self._images, self._flip = family, family.pipe.vae, images, flip
        marks = [_mark_of_image(image) for image in images]
        first: dict[str, int] = {}
        self._same = [first.setdefault(mark, index) for index, mark in enumerate(marks)]
        vae = self._vae
        model = fingerprint([vae], str([vae.config.get(name) for name in _SCALES])) if keep == "disk" else ""
        self._posteriors = Encoded(
            self._posterior, keep, folder, lambda view: f"latents-{model}-{marks[view[0]]}-{int(view[1])}"
        )
        vae.to(device)
        self._posteriors.prepare((index, mirrored) for index in first.values() for mirrored in {False, flip})
        if keep != "none":
            vae.to("cpu")

    def sample(self, index: int, generator: torch.Generator) -> tuple[Tensor, bool]:
        """Draw z ~ N(mean, std²) for an image: (channels, height, width), float32, on the CPU; and whether mirrored."""
        mirrored = self._flip and bool(torch.randint(2, (), generator=generator))
        posterior = self._posteriors[self._same[index], mirrored]
        mean, std = posterior["mean"], posterior["std"]
        return mean + std * torch.randn(mean.shape, generator=generator), mirrored

    @torch.no_grad()
    def _posterior(self, view: View) -> dict[str, Tensor]:
        """Scaled mean and standard deviation, each (channels, height, width), float32."""
        image = self._images[view[0]]
        image = ImageOps.mirror(image) if view[1] else image
        before = self._vae.dtype
        _cast(self._vae, torch.float32)
        try:
            mean, std = self._family.posterior(_pixels(image).to(self._vae.device))
        finally:
            # Widening and narrowing again gives the same half-precision numbers back.
            _cast(self._vae, before)
        return {"mean": mean[0], "std": std[0]}


def _mark_of_image(image: Image.Image) -> str:
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


def _cast(vae: nn.Module, dtype: torch.dtype) -> None:
    # Diffusers' own `to` warns about every cast, also about those that do no harm.
    nn.Module.to(vae, dtype=dtype)


def _pixels(image: Image.Image) -> Tensor:
    """(1, 3, height, width) in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32)
    return (torch.from_numpy(array) / 127.5 - 1).permute(2, 0, 1).unsqueeze(0)


class Texts:
    """The encoded prompts of any choice of training images.

    Args:
        family: of the pipeline.
        prompts: all that will be asked for.
        encoders: the pipeline's text encoders.
        trained: whether gradients have to reach them, which takes them in every step.
        device: where they run; frozen ones go to the CPU afterwards unless they have to run in each step.
        keep: where the outputs of frozen ones stay.
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
        self._family, self._device, self._trained, self._dtype = family, device, trained, family.dtype
        model = fingerprint(encoders) if keep == "disk" and not trained else ""
        keep = "none" if trained else keep
        texts = list(dict.fromkeys(prompts))
        way = family.prepare(texts)
        self._encoded = Encoded(self._encode_one, keep, folder, lambda text: f"text-{model}-{way}{_mark_of_text(text)}")
        for encoder in encoders:
            encoder.to(device)
        self._encoded.prepare(texts)
        if keep != "none":
            for encoder in encoders:
                encoder.to("cpu")

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What `Family.encode` says of these prompts, in this order and in the denoiser's dtype."""
        distinct = list(dict.fromkeys(prompts))
        if self._trained:
            tensors = self._family.encode(distinct, self._device)
        else:
            each = [self._encoded[prompt] for prompt in distinct]
            tensors = {name: _stacked([one[name] for one in each]).to(self._device) for name in each[0]}
        rows = [distinct.index(prompt) for prompt in prompts]
        return {name: _as(tensor, self._dtype)[rows] for name, tensor in tensors.items()}

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self._family.encode([prompt], self._device).items()}


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other, with zeros at the end of those that are shorter."""
    longest = max((len(tensor) for tensor in tensors if tensor.dim()), default=0)
    return torch.stack(
        [torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])]) for tensor in tensors]
    )


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another type, unless it holds whole numbers or a mask."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _mark_of_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
