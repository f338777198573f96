"""The scale of a layer's update, as the program that wrote the file meant it.

By the layer's own `alpha` tensor, alpha / r; 0 stands for r, as kohya's scripts and LyCORIS read it. Without such
tensors, by PEFT's configs in the header (or, in PEFT's own folders, in `adapter_config.json`), or by a plain `alpha`,
`lora_alpha` or `network_alpha` there; else 1. Diffusers writes PEFT's configs as one JSON object,
`lora_adapter_metadata`: a single model's config as it is, a pipeline's with every field as `<component>.<field>`.

Two whole factors of LoKr have no rank. LyCORIS, ComfyUI and Diffusers ignore their alpha, so it may be anything, also
the infinity that 10¹⁰ is in fp16; PEFT always applies its config's; some programs divide alpha by the rank in the
header, see `AlphaOfWhole`.

`rs_lora` in kohya's `ss_network_args` (LyCORIS' rank stabilisation) divides by √r. LyCORIS 3 and later writes an alpha
that is √r times as large as the user's, `ss_network_alpha`, so that alpha / r is right again; others write the user's.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import AdapterFileError, ConfigError
from ...tuner.names import without_component, without_peft_prefix
from ...tuner.patterns import check_expressions, check_matching, first_match
from ..unused import AlphaOfWhole

HEADER = "lora_adapter_metadata"
MOST_COMPONENTS = 100
"""Of a pipeline, in a file's header."""

_ALPHAS = ("alpha", "lora_alpha", "network_alpha")
_RANKS = ("ss_network_dim", "network_dim", "lora_dim", "lora_rank", "rank", "dim", "r")
_RSLORA = ("use_rslora", "rs_lora", "rslora")


@dataclass(frozen=True)
class Scales:
    """What a file's header says about the scales of its layers.

    Attributes:
        source: what to call the file in errors.
        configs: PEFT's, component → fields, "" for a single model.
        alpha: of all layers, where no layer has a tensor of its own; None if the header has none.
        rank: of all layers, by the header, or of all layers that have one, by their tensors; None if it is not known.
        stabilised: whether scales are alpha / √r.
        user_alphas: `ss_network_alpha`, and `conv_alpha` of `ss_network_args`: what the user asked for.
        alpha_of_whole: what the alpha of two whole factors means.
    """

    source: str
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alpha: float | None = None
    rank: float | None = None
    stabilised: bool = False
    user_alphas: tuple[float, ...] = ()
    alpha_of_whole: AlphaOfWhole = "ignored"
    _disputed: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)

    def of(self, layer: str, rank: int | None, alpha: float | None = None) -> float:
        """The scale of a layer's update.

        Args:
            layer: its name in the file.
            rank: of its decomposed factors; None for whole ones.
            alpha: its own; None if it has none.

        Raises:
            AdapterFileError: the alpha or rank is not a number that a scale could be made of.
        """
        if alpha is None:
            found = self.of_layer(layer)
            if found is not None:
                return self._by_config(*found, rank)
            if self.alpha is None:
                return 1.0
            alpha = self.alpha
            if rank is not None:
                return self._scale(alpha, rank, self.stabilised)
        if rank is None:
            return self._of_whole(layer, alpha)
        alpha = alpha or rank
        return self._scale(alpha, rank, self._is_raw(layer, alpha, rank))

    def of_layer(self, layer: str) -> tuple[str, Mapping[str, Any]] | None:
        """A layer's name in its model and PEFT's config that is for it; None if there is none."""
        for part, config in self.configs.items():
            if layer.startswith(f"{part}.") or not part:
                return without_peft_prefix(without_component(part, layer)), config
        return None

    def check(self, names: Collection[str]) -> None:
        """Raise `AdapterFileError` if a config's patterns could take all too long to match these layers' names."""
        for config in self.configs.values():
            for field_name in ("alpha_pattern", "rank_pattern"):
                patterns = config.get(field_name)
                if not isinstance(patterns, Mapping):
                    continue  # `of` says so, where it is asked
                try:
                    check_expressions(field_name, patterns)
                    check_matching(names, endings=patterns)
                except ConfigError as error:
                    raise AdapterFileError(f"{self.source} has a config that does not work: {error}") from error

    def warn(self) -> None:
        """Say for which layers programs disagree about the scale, if there are any."""
        if not self._disputed:
            return
        layer, (alpha, rank) = next(iter(self._disputed.items()))
        warnings.warn(
            f"{self.source}: {len(self._disputed)} LoKr layers, such as {layer}, have two whole factors and alpha "
            f"{alpha:g} beside rank {rank:g}. Their scale is taken as 1, as LyCORIS, ComfyUI and Diffusers do; in "
            f"programs that apply alpha / rank it is {alpha / rank:g}. If one of those made the file, choose "
            "alpha_of_whole='applied' (--alpha-of-whole applied on the command line).",
            UserWarning,
            stacklevel=2,
        )

    def _of_whole(self, layer: str, alpha: float) -> float:
        if self.stabilised and not self.rank:
            raise AdapterFileError(
                f"{self.source} was trained with rs_lora, and the layer {layer} has two whole factors, which then are "
                "scaled by √rank, but no rank stands in its header (ss_network_dim): its scale is not known."
            )
        if not self.rank or not alpha or alpha == self.rank:
            return 1.0
        if not math.isfinite(alpha):
            return math.sqrt(self.rank) if self.stabilised else 1.0
        scale = self._scale(alpha, self.rank, stabilised=False)
        if self.stabilised and math.isclose(scale, math.sqrt(self.rank), rel_tol=1e-2):
            return math.sqrt(self.rank)
        if self.alpha_of_whole == "applied":
            return scale
        self._disputed[layer] = (alpha, self.rank)
        return 1.0

    def _is_raw(self, layer: str, alpha: float, rank: int) -> bool:
        """Whether a layer's alpha has still to be divided by √r instead of r."""
        if not self.stabilised or rank == 1:
            return False
        found = {
            raw
            for user in self.user_alphas
            for raw, expected in ((True, user or rank), (False, (user or rank) * math.sqrt(rank)))
            if math.isclose(alpha, expected, rel_tol=1e-2)
        }
        if len(found) == 1:
            return found.pop()
        users = " or ".join(f"{user:g}" for user in self.user_alphas) or "not known"
        raise AdapterFileError(
            f"{self.source} was trained with rs_lora, and the layer {layer} has alpha {alpha:g} at rank {rank}. That "
            f"should be the user's alpha ({users}) or √{rank} times as large, and does not tell which: its scale is "
            "not known."
        )

    def _by_config(self, name: str, config: Mapping[str, Any], rank: int | None) -> float:
        """alpha / r by a config, or with `use_rslora` alpha / √r; 1 if it says nothing about alpha.

        Both come from the layer's entry in `alpha_pattern` and `rank_pattern`, or else count for all layers. `rank` is
        used as r where the layer's tensors have one.
        """
        alpha = self._value(config, "alpha_pattern", name, config.get("lora_alpha", config.get("alpha")))
        if alpha is None:
            return 1.0
        r = rank or self._value(config, "rank_pattern", name, config.get("r"))
        return self._scale(alpha, r, bool(config.get("use_rslora")))

    def _value(self, config: Mapping[str, Any], pattern: str, name: str, otherwise: Any) -> Any:
        patterns = config.get(pattern) or {}
        try:
            return patterns.get(first_match(patterns, name), otherwise)
        except (AttributeError, TypeError, re.error) as error:
            raise AdapterFileError(
                f"{self.source} has a config whose {pattern} does not work ({error}); it should map regular "
                f"expressions to numbers, but is {patterns!r}."
            ) from error

    def _scale(self, alpha: Any, r: Any, stabilised: bool) -> float:
        try:
            scale = alpha / (math.sqrt(r) if stabilised else r)
            if math.isfinite(scale):
                return float(scale)
        except (TypeError, ValueError, ArithmeticError):
            pass
        raise AdapterFileError(
            f"{self.source} has alpha {alpha!r} and rank {r!r}; both should be finite numbers, and the rank at least 1."
        )


def from_header(
    metadata: Mapping[str, str],
    source: str,
    rank: float | None = None,
    alpha_of_whole: AlphaOfWhole = "ignored",
) -> Scales:
    """What a file's header says.

    Args:
        metadata: the header.
        source: what to call the file in errors.
        rank: of all layers that have one, by their tensors; the header's own goes before.
        alpha_of_whole: what the alpha of two whole factors means.

    Raises:
        AdapterFileError: an entry is not what it should be.
    """
    arguments = _arguments(metadata, source)
    given = {name: _number(metadata, name, source) for name in (*_ALPHAS, *_RANKS)}
    stated = next((one for name in _RANKS if (one := given[name]) and 0 < one < math.inf), None)
    users = (_number(metadata, "ss_network_alpha", source), _number(arguments, "conv_alpha", source))
    return Scales(
        source,
        _configs(metadata, source) if metadata.get(HEADER) else {},
        alpha=next((given[name] for name in _ALPHAS if given[name] is not None), None),
        rank=stated or rank,
        stabilised=any(_is_true(where.get(name)) for name in _RSLORA for where in (arguments, metadata)),
        user_alphas=tuple(dict.fromkeys(alpha for alpha in users if alpha is not None)),
        alpha_of_whole=alpha_of_whole,
    )


def _configs(metadata: Mapping[str, str], source: str) -> dict[str, dict[str, Any]]:
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
    if len(configs) > MOST_COMPONENTS:
        raise AdapterFileError(
            f"{source} has configs for {len(configs):,} components in its header, and {MOST_COMPONENTS} is the most."
        )
    return configs


def _arguments(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """kohya's `ss_network_args`, what the network was made with."""
    text = metadata.get("ss_network_args")
    if not text or text == "None":
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{source} has damaged `ss_network_args` in its header ({error}).") from error
    return found if isinstance(found, dict) else {}


def _number(metadata: Mapping[str, Any], name: str, source: str) -> float | None:
    text = metadata.get(name)
    if text is None or text in ("", "None", "null", "Dynamic"):
        return None
    try:
        return float(text)
    except (TypeError, ValueError) as error:
        if name not in _ALPHAS:
            return None
        raise AdapterFileError(
            f"{source} has {name} {text!r} in its header, which should be a number: the scale of its layers is not "
            "known."
        ) from error


def _is_true(value: object) -> bool:
    return str(value).strip().lower() in ("true", "1", "yes")
