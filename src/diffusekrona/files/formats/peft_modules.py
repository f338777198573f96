"""OFT, BOFT and (IA)³ as PEFT writes them, and OneTrainer's OFT, computed by PEFT.

OFT        `<layer>.oft_R.weight`, n × b·(b − 1)/2: what is above the diagonal of skew-symmetric Q, which give rotations
           of n groups of b inputs, or of all groups the same if n is 1 (`block_share`).
BOFT       `<layer>.boft_R`, m × n × b × b, and `<layer>.boft_s`, one factor per output.
(IA)³      `<layer>.ia3_l`, one factor per output, which multiply the bias too; or one per input of the layers that are
           among the config's `feedforward_modules`.

PEFT's own files need their config, which says how a Q becomes a rotation. OneTrainer's have none, since it knows one
way only: PEFT's with five terms of the Neumann series. `<layer>.oft_R.scaled_oft` makes Q smaller by 2·√(b − 1). A
convolution's weight is rotated the other way round, by the inverse of what PEFT takes.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from peft import (
    BOFTConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from ...errors import AdapterFileError
from ...tuner.compat import BaseTunerLayer, block_diagonals, scales_inputs
from ...tuner.names import PEFT_PREFIX
from ...tuner.patterns import check_expressions, check_matching
from .krona import CONFIG_NAME
from .library import LibraryUpdate, common, layer_around
from .updates import LayerTensors, by

OFT_PARTS = {
    ".oft_R.weight": "oft_R.weight",
    ".oft_R.default.weight": "oft_R.weight",
    ".oft_R.scaled_oft": "scaled_oft",
}
BOFT_PARTS = {f".{part}{adapter}": part for part in ("boft_R", "boft_s") for adapter in ("", ".default")}
IA3_PARTS = {".ia3_l": "ia3_l", ".ia3_l.default": "ia3_l"}
"""End of a tensor's name → part, as PEFT names it."""

MOST_TERMS = 1000
"""Of a Neumann series; five are usual, and each takes time."""

_CONFIGS: dict[str, tuple[type[PeftConfig], tuple[str, ...]]] = {
    "OFT": (
        OFTConfig,
        ("r", "oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps", "block_share"),
    ),
    "BOFT": (BOFTConfig, ("boft_block_size", "boft_block_num")),
    "IA3": (IA3Config, ("feedforward_modules",)),
    "LORA": (LoraConfig, ("init_lora_weights", "use_rslora")),
}
"""PEFT's name of a method → its config, and the fields of it that change what a layer computes.

Beside them BOFT's `boft_n_butterfly_factor` does: there the tensor's first dimension counts, because PEFT takes 1 for
any number where it has no CUDA extension.
"""


@dataclass(frozen=True, eq=False)
class PeftUpdate(LibraryUpdate):
    """What PEFT's layer makes of a weight.

    Attributes:
        name: the layer's in its model, which some fields of the config go by.
        config: PEFT's config of the method.
    """

    name: str
    config: PeftConfig

    library: ClassVar[str] = "PEFT"

    def computed(self, weight: Tensor) -> Tensor:
        """W' of a model that consists of this one layer, merged by PEFT, less W."""
        if self.kind == "oft" and weight[0, 0].numel() > 1:
            raise AdapterFileError(
                f"{self.where} is PEFT's OFT on a convolution with a kernel of {by(weight.shape[2:])}. What PEFT "
                "computes there, in training too, no weight can give: it counts overlapping patches several times. "
                "Only kernels of 1 × 1 can be merged."
            )
        return self.merged(weight) - weight

    def of_rows(self, first: int, last: int) -> LibraryUpdate:
        """As `LibraryUpdate.of_rows`: what is done to the inputs is done to every row."""
        part = {"boft": "boft_s", "ia3": "ia3_l"}.get(self.kind)
        if part is None:
            return self
        factors = self.tensors[part]
        if factors.dim() > 2 or (factors.shape[1] > 1 and part == "boft_s"):
            return super().of_rows(first, last)  # a convolution's, which no model has fused
        # Those of (IA)³ on the inputs are one row.
        return self if len(factors) == 1 else replace(self, tensors={**self.tensors, part: factors[first:last]})

    def merged(self, weight: Tensor) -> Tensor:
        """W'."""
        base = layer_around(weight.clone())
        with warnings.catch_warnings(), block_diagonals():
            warnings.simplefilter("ignore")  # that a block size is rounded to what fits the layer
            model = get_peft_model(_named(self.name, base), self.config)
            prefix = f"{PEFT_PREFIX}{self.name}."
            for name, expected in get_peft_model_state_dict(model, save_embedding_layers=False).items():
                part = name.removeprefix(prefix)
                if self.tensors[part].shape != expected.shape:
                    raise self.misfit(
                        f"with {part} of {by(self.tensors[part].shape)}, where its settings give {by(expected.shape)}",
                        weight,
                    )
            set_peft_model_state_dict(model, {f"{prefix}{part}": tensor for part, tensor in self.tensors.items()})
            merged: Any = model.merge_and_unload()
        result: Tensor = merged.get_submodule(self.name).weight
        return result

    def check_layer(self, layer: nn.Module) -> None:
        """Raise `AdapterFileError` if the layer has a bias that (IA)³ multiplies: a merge changes weights only."""
        base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if self.kind == "ia3" and getattr(base, "bias", None) is not None and not scales_inputs(self.config, self.name):
            raise AdapterFileError(
                f"{self.where} is (IA)³ on the outputs of a layer with a bias, which it multiplies too, and only "
                "weights are merged here: merge it with PEFT's merge_and_unload."
            )


@dataclass(frozen=True, eq=False)
class OneTrainerOFT(PeftUpdate):
    """What OneTrainer's OFT makes of a weight."""

    def computed(self, weight: Tensor) -> Tensor:
        """As PEFT's for a linear layer; of a convolution's weight, d × (h·kernel), with the inverse rotation."""
        if weight.dim() == 2:
            return super().computed(weight)
        # The truncated series of −Q is the transposed of that of Q.
        turned = replace(self, tensors={part: -tensor for part, tensor in self.tensors.items()})
        return turned.merged(weight.flatten(1)).reshape(weight.shape) - weight


def rebased_lora(layer: LayerTensors, up: Tensor, down: Tensor) -> PeftUpdate:
    """A LoRA layer that was trained from PiSSA or OLoRA, which take a part out of the base's weight.

    Args:
        layer: of a file with PEFT's config.
        up: d × r.
        down: r × h.

    Raises:
        AdapterFileError: PEFT does not take the config, or there is more than two factors.
    """
    assert layer.scales is not None
    beside = sorted(layer.parts.keys() - {"up", "down", "alpha"})
    if beside:
        raise layer.error(
            f"was trained from PiSSA or OLoRA and holds {', '.join(beside)} beside its factors, which cannot be merged "
            "here together: merge it with PEFT's merge_and_unload"
        )
    name, settings = _settings(layer, "LORA")
    rank = down.shape[0]
    alpha = layer.scale(rank) * (math.sqrt(rank) if settings.get("use_rslora") else rank)
    tensors = {"lora_A.weight": down, "lora_B.weight": up}
    config = _config(layer, name, "LORA", settings, r=rank, lora_alpha=alpha)
    return PeftUpdate(tensors, name, config, kind="lora", **layer.common())


def read_oft(layer: LayerTensors) -> PeftUpdate:
    """One layer of OFT: PEFT's if there is a config, else OneTrainer's.

    Raises:
        AdapterFileError: a tensor is not finite or misshapen; PEFT's config is missing, of another method, of a
            PEFT that computed something else, or asks for what is not known here.
    """
    found = common(layer, "scaled_oft")
    vectors = layer.matrix("oft_R.weight")
    if layer.peft_config is None and not layer.name.startswith(PEFT_PREFIX):
        return _onetrainer(layer, vectors)
    if "scaled_oft" in layer.parts:
        raise layer.error("holds scaled_oft, which only OneTrainer's files have, which come without PEFT's config")
    name, settings = _settings(layer, "OFT")
    if settings.get("use_cayley_neumann", True) and _version(settings) < (0, 18):
        raise layer.error(
            f"was written by PEFT {settings.get('peft_version') or 'before 0.18'}, which computed OFT's Neumann series "
            "(use_cayley_neumann) by another formula than PEFT does since 0.18; merge it with that PEFT"
        )
    return PeftUpdate({"oft_R.weight": vectors}, name, _config(layer, name, "OFT", settings), kind="oft", **found)


def read_boft(layer: LayerTensors) -> PeftUpdate:
    """One layer of PEFT's BOFT.

    Raises:
        AdapterFileError: a tensor is missing, not finite or misshapen; or the config is, as for OFT.
    """
    found = common(layer)
    tensors = {"boft_R": layer.matrix("boft_R", (4,)), "boft_s": layer.matrix("boft_s", (2,))}
    name, settings = _settings(layer, "BOFT")
    config = _config(layer, name, "BOFT", settings, boft_n_butterfly_factor=len(tensors["boft_R"]))
    return PeftUpdate(tensors, name, config, kind="boft", **found)


def read_ia3(layer: LayerTensors) -> PeftUpdate:
    """One layer of PEFT's (IA)³.

    Raises:
        AdapterFileError: the tensor is not finite or misshapen; or the config is, as for OFT.
    """
    found = common(layer)
    factors = layer.matrix("ia3_l", (2, 3, 4, 5))
    name, settings = _settings(layer, "IA3")
    return PeftUpdate({"ia3_l": factors}, name, _config(layer, name, "IA3", settings), kind="ia3", **found)


def _onetrainer(layer: LayerTensors, vectors: Tensor) -> OneTrainerOFT:
    n, entries = vectors.shape
    b = (1 + math.isqrt(1 + 8 * entries)) // 2
    layer.check(b * (b - 1) // 2 == entries, "oft_R.weight")
    if "scaled_oft" in layer.parts and bool(layer.parts["scaled_oft"].any()):
        vectors = vectors / (2 * math.sqrt(b - 1))
    config = OFTConfig(
        oft_block_size=b,
        block_share=n == 1,  # the same for a layer with one block only
        use_cayley_neumann=True,
        num_cayley_neumann_terms=5,
        target_modules="layer",
        inference_mode=True,
    )
    return OneTrainerOFT({"oft_R.weight": vectors}, "layer", config, kind="oft", **common(layer, "scaled_oft"))


def _settings(layer: LayerTensors, method: str) -> tuple[str, Mapping[str, Any]]:
    """The layer's name in its model, and the config for it as the file has it."""
    found = None if layer.scales is None else layer.scales.of_layer(layer.name)
    if found is None:
        raise layer.error(
            f"is of PEFT's {method}, which is nothing without its config: keep {CONFIG_NAME} beside the weights"
        )
    name, settings = found
    if settings.get("peft_type") != method:
        raise layer.error(f"is of PEFT's {method}, but the config is for {settings.get('peft_type')}")
    known = {field.name for field in fields(_CONFIGS[method][0])}
    unknown = sorted(key for key, value in settings.items() if key not in known and value)
    if unknown:
        raise layer.error(
            f"has a config with {', '.join(unknown)}, which this version of PEFT does not know; update PEFT"
        )
    return name, settings


def _config(layer: LayerTensors, name: str, method: str, settings: Mapping[str, Any], **further: Any) -> PeftConfig:
    """PEFT's config for one layer."""
    kind, obeyed = _CONFIGS[method]
    chosen = {field: settings[field] for field in obeyed if field in settings}
    terms, listed = chosen.get("num_cayley_neumann_terms", 1), chosen.get("feedforward_modules")
    if isinstance(terms, (int, float)) and not terms <= MOST_TERMS:
        raise layer.error(f"has a config with {terms} terms of a series (num_cayley_neumann_terms), and 5 are usual")
    try:
        if isinstance(listed, str):
            check_expressions("feedforward_modules", [listed], whole=True)
            check_matching([name], whole=[listed])
        elif method == "IA3" and not (isinstance(listed, list) and all(isinstance(one, str) for one in listed)):
            raise TypeError(f"feedforward_modules should be a list of names, not {listed!r}")
        # As a regular expression: the names of a list would have to be among those of target_modules.
        return kind(target_modules=re.escape(name), inference_mode=True, **chosen, **further)
    except (TypeError, ValueError) as error:
        raise layer.error(f"has a config that PEFT does not take ({error})") from error


def _version(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the PEFT that wrote the config; 0 before it said so, in 0.18."""
    numbers = re.match(r"(\d+)\.(\d+)", str(settings.get("peft_version")))
    return (0,) if numbers is None else tuple(map(int, numbers.groups()))


def _named(name: str, layer: nn.Module) -> nn.Module:
    """A model that has this layer, under this name, and no other."""
    model = parent = nn.Module()
    *before, last = name.split(".")
    for part in before:
        child = nn.Module()
        parent.add_module(part, child)
        parent = child
    parent.add_module(last, layer)
    return model
