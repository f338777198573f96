"""Base models whose weights are quantized as they are loaded: which library does it, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import KronAError

if TYPE_CHECKING:
    import torch

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
"""What quantizes to each format."""

BYTES = {"nf4": 0.5 + 1 / 64, "int8": 1.0, "fp8": 1.0}
"""Of each weight of a linear layer. nf4's scale of 8 bits for every 64 of them is counted, a scale for a row is not."""


class QuantizationError(KronAError):
    """A base cannot be quantized here."""


class Quantization(NamedTuple):
    """The formats of a base's linear layers: "nf4", "int8", "fp8", or None for as they are.

    Attributes:
        denoiser: of the UNet or the transformer.
        text_encoders: of all text encoders.
    """

    denoiser: str | None = None
    text_encoders: str | None = None

    def of(self, component: str) -> str | None:
        """The format of a pipeline's component."""
        from ..tuner.names import DENOISERS  # which loads torch; settings are read without

        if component.startswith("text_encoder"):
            return self.text_encoders
        return self.denoiser if component.partition("_")[0] in DENOISERS else None

    def check(self) -> None:
        """Raise `QuantizationError` where a package is missing."""
        for kind in self:
            if kind is not None and find_spec(PACKAGES[kind]) is None:
                raise QuantizationError(f"Quantizing to {kind} needs {PACKAGES[kind]}: pip install {PACKAGES[kind]}.")


def on_loading(chosen: Quantization, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """What Diffusers' `from_pretrained` takes as `quantization_config`, or None where nothing is quantized by it.

    Args:
        chosen: the formats.
        index: of the pipeline, the classes of its components with their libraries.
        dtype: that is computed in.
    """
    from diffusers import PipelineQuantizationConfig

    found = {
        name: _config(kind, entry[0], dtype)
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] is not None and (kind := chosen.of(name)) is not None
        if not _by_us(kind)
    }
    return PipelineQuantizationConfig(quant_mapping=found) if found else None


def after_loading(chosen: Quantization, pipe: Any, dtype: torch.dtype) -> None:
    """Quantize what Diffusers and transformers would only on a GPU, in place."""
    for name, module in pipe.components.items():
        kind = chosen.of(name)
        if kind is not None and _by_us(kind) and module is not None:
            _to_nf4(module, dtype)


def _by_us(kind: str) -> bool:
    """Diffusers wants a GPU for bitsandbytes, which has done without for a while."""
    import torch

    return kind == "nf4" and not torch.accelerator.is_available()


def _config(kind: str, library: str, dtype: torch.dtype) -> Any:
    configs: Any = import_module("transformers" if library == "transformers" else "diffusers")
    if kind == "nf4":
        return configs.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow

    # The second version has the tensors that a merge can write back.
    return configs.TorchAoConfig(
        Int8WeightOnlyConfig(granularity=PerRow(), version=2) if kind == "int8" else Float8WeightOnlyConfig()
    )


def _to_nf4(model: Any, dtype: torch.dtype) -> None:
    import bitsandbytes

    for parent, name, layer in list(_linear_layers(model)):
        quantized = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4",
            compress_statistics=True, device="meta",
        )  # fmt: skip
        settings = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True, "module": quantized}
        quantized.weight = bitsandbytes.nn.Params4bit(layer.weight.data.contiguous(), **settings).to("cpu")
        quantized.bias = layer.bias
        setattr(parent, name, quantized.requires_grad_(False).train(layer.training))


def _linear_layers(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """Those that Diffusers would quantize: with the module that has each, and its name there."""
    from torch import nn

    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for path, parent in model.named_modules():
        for name, layer in parent.named_children():
            whole = f"{path}.{name}".split(".")
            if type(layer) is nn.Linear and not any(part in whole for part in kept) and name != "lm_head":
                yield parent, name, layer


def index_of(folder: Path) -> dict[str, Any]:
    """A pipeline's index; empty where it cannot be read."""
    try:
        return dict(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
