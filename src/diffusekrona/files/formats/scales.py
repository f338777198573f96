"""The scales that PEFT's configs, in the header of a Diffusers or PEFT file, give to its layers.

Diffusers writes them as one JSON object, `lora_adapter_metadata`: a single model's config as it is, a pipeline's with
every field as `<component>.<field>`. PEFT's own folders keep the config in `adapter_config.json`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import AdapterFileError
from ...tuner.compat import get_pattern_key
from ...tuner.names import without_component, without_peft_prefix

HEADER = "lora_adapter_metadata"


@dataclass(frozen=True)
class Scales:
    """What PEFT's configs say: component → fields of its config, "" for a single model."""

    source: str
    configs: Mapping[str, Mapping[str, Any]]

    def of(self, layer: str, rank: int | None) -> float:
        """alpha / r of a layer, or with `use_rslora` alpha / √r; 1 if no config says anything about it.

        Both come from the layer's entry in `alpha_pattern` and `rank_pattern`, or else count for all layers. `rank` is
        used as r where the layer's tensors have one.

        Raises:
            AdapterFileError: the config's alpha or rank is not a number that a scale could be made of.
        """
        for part, config in self.configs.items():
            if layer.startswith(f"{part}.") or not part:
                name = without_peft_prefix(without_component(part, layer))
                alpha = self._value(config, "alpha_pattern", name, config.get("lora_alpha", config.get("alpha")))
                if alpha is None:
                    return 1.0
                r = rank or self._value(config, "rank_pattern", name, config.get("r"))
                return self._scale(alpha, r, bool(config.get("use_rslora")))
        return 1.0

    def _value(self, config: Mapping[str, Any], pattern: str, name: str, otherwise: Any) -> Any:
        patterns = config.get(pattern) or {}
        try:
            return patterns.get(get_pattern_key(list(patterns), name), otherwise)
        except (AttributeError, TypeError, re.error) as error:
            raise AdapterFileError(
                f"{self.source} has a config whose {pattern} does not work ({error}); it should map regular "
                f"expressions to numbers, but is {patterns!r}."
            ) from error

    def _scale(self, alpha: Any, r: Any, rslora: bool) -> float:
        try:
            scale = alpha / (math.sqrt(r) if rslora else r)
            if math.isfinite(scale):
                return float(scale)
        except (TypeError, ValueError, ArithmeticError):
            pass
        raise AdapterFileError(
            f"{self.source} has a config with alpha {alpha!r} and rank {r!r}; both should be numbers, and the rank "
            "at least 1."
        )


def from_header(metadata: Mapping[str, str], source: str) -> Scales:
    """The configs in a file's header, which has a `lora_adapter_metadata`.

    Raises:
        AdapterFileError: the entry is not a JSON object.
    """
    try:
        fields = json.loads(metadata[HEADER])
        items = list(fields.items())
    except (ValueError, RecursionError, AttributeError) as error:
        raise AdapterFileError(
            f"{source} has a damaged `{HEADER}` in its header ({error}); it should be a JSON object."
        ) from error
    configs: dict[str, dict[str, Any]] = {}
    for key, value in items:
        part, _, name = key.rpartition(".")
        configs.setdefault(part, {})[name] = value
    return Scales(source, configs)
