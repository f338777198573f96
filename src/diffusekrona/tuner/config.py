"""KronAConfig: what the user chooses about an adapter, checked where it is made."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, get_args

from peft import PeftConfig

from ..errors import ConfigError
from ..kron.shapes import Layout
from .fields import ATTENTION, FIELDS, PRESETS, ROWS_OF_A, Init, Scaling
from .mixed import allow_mixing
from .names import PREFIX
from .patterns import check_expressions


class KronAPeftType(str, Enum):
    """KronA's entry in PEFT's tables of methods. A `str`, because saved configs hold it as text."""

    KRONA = "KRONA"


def _declared(name: str) -> Any:
    default, text = FIELDS[name]
    return field(default=default, metadata={"help": text})


@dataclass
class KronAConfig(PeftConfig):
    r"""Configuration of a Kronecker adapter: ΔW = alpha · A ⊗ B for each targeted linear layer.

    A layer of d outputs and h inputs gets A of a1 × a2 and B of (d/a1) × (h/a2). The defaults are the paper's best
    settings (Section 4.2, Appendix D.2): (4, 64), A normal, B zero, so that a fresh adapter changes nothing.

    Args:
        a1: rows of A; must divide the outputs of every targeted layer. 4 if neither it nor b1 is given.
        a2: columns of A; must divide the inputs of every targeted layer.
        b1: rows of B in place of a1, which then is d/b1 in a layer of d outputs, as CDKA gives the factors (arXiv
            2602.01267). With b1 and a2 of 1 and `num_terms` of r, the update is a LoRA of rank r.
        alpha: the scale s of the update.
        scaling: "alpha" for a scale of alpha; "cdka" for alpha / √(num_terms · a2), as in that paper, so that neither
            the number of terms nor the length of the sums over A's columns changes the size of the update.
        num_terms: how many products are summed, ΔW = alpha · Σ A_r ⊗ B_r, each with factors of its own.
        b_rank: ρ, to make B a product B1·B2 of b1 × ρ and ρ × b2 wherever that has fewer parameters, as LoKr does.
        target_modules: which layers to adapt: names, matched exactly or as a dotted suffix; or one regular expression
            that must match a layer's whole name; or one of "attention" (the default: every linear layer of attention
            in Diffusers UNets and transformers and in CLIP and T5 text encoders), "attention+ff" (also the
            feed-forward layers, Appendix D.1), "cross-attention" and PEFT's "all-linear". What such a word means is
            decided when the adapter is put into a model.
        exclude_modules: layers to leave out, named as in `target_modules`.
        factor_pattern: regular expression → (a1, a2) for the layers whose name, or whose dotted suffix, it matches,
            also where b1 is given; the first match counts. For example `{"to_k": (2, 32), r"mid_block\..*": (8, 64)}`.
        alpha_pattern: regular expression → alpha, matched likewise.
        terms_pattern: regular expression → num_terms, matched likewise.
        dropout: probability in [0, 1) of zeroing each input feature of the update while training.
        init_a: how A starts. Appendix D.2 names the choices without saying whether it gives a variance or a standard
            deviation; here it is always the standard deviation, as in the authors' own code.
            "zeros": 0. "normal": N(0, 1/a2) of the paper, standard deviation 1/a2. "normal_sqrt": N(0, √min(d, h)),
            standard deviation √min(d, h) of the layer. "kaiming_uniform": the paper's KU, uniform within
            √(6 / columns). "xavier_uniform": the paper's XU, uniform within √(6 / (rows + columns)).
        init_b: how B starts; the same names. "normal" has standard deviation 1/a2 for B, too.
        init_weights: True starts the factors as `init_a` and `init_b` say. False makes both random ("normal"), so that
            a test sees an update that is not zero.
        layout: "kron" for ΔW = A ⊗ B. "transposed" for what the paper's authors' own code computes, which writes its
            outputs in the order [b1, a1]: row i·b1 + k of A ⊗ B is row k·a1 + i of ΔW. Linear layers only.
        layers_to_transform: adapt only the layers with these indices in their name.
        layers_pattern: name of the list that `layers_to_transform` counts in.
        modules_to_save: modules that are trained in full and saved with the adapter.

    Raises:
        ConfigError: a value that no layer could use.

    Examples:
        >>> config = KronAConfig(a1=4, a2=64, factor_pattern={"to_k|to_v": (2, 32)}, exclude_modules=["to_q"])
        >>> config.factor_pattern["to_k|to_v"]
        (2, 32)
    """

    a1: int | None = _declared("a1")
    a2: int = _declared("a2")
    b1: int | None = _declared("b1")
    alpha: float = _declared("alpha")
    scaling: Scaling = _declared("scaling")
    num_terms: int = _declared("num_terms")
    b_rank: int | None = _declared("b_rank")
    target_modules: list[str] | set[str] | str | None = _declared("target_modules")
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    factor_pattern: dict[str, tuple[int, int]] = field(
        default_factory=dict, metadata={"help": "Regular expression → (a1, a2) of the layers it matches."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Regular expression → alpha of the layers it matches."}
    )
    terms_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Regular expression → num_terms of the layers it matches."}
    )
    dropout: float = _declared("dropout")
    init_a: Init = _declared("init_a")
    init_b: Init = _declared("init_b")
    layout: Layout = field(default="kron", metadata={"help": "Order of the outputs; 'kron' unless imported."})
    init_weights: bool = field(default=True, metadata={"help": "False makes both factors random, for tests."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "List the indices count in."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = KronAPeftType.KRONA
        allow_mixing(self.peft_type, (f"{PREFIX}A", f"{PREFIX}B"))
        if self.target_modules is None:
            self.target_modules = ATTENTION
        self.target_modules = _names("target_modules", self.target_modules)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        if not self.target_modules:
            raise ConfigError("target_modules is empty; name at least one layer, or leave it out for Q, K, V and O.")
        if self.modules_to_save is not None:
            self.modules_to_save = _name_list("modules_to_save", self.modules_to_save)
            check_expressions("modules_to_save", self.modules_to_save)
        self._check_indices()
        self._check_factors()
        self._check_scales()
        self._check_init()

    def _check_indices(self) -> None:
        if self.layers_pattern:
            if self.layers_to_transform is None:
                raise ConfigError("layers_pattern does nothing without layers_to_transform; give the indices.")
            if not isinstance(self.layers_pattern, str):
                self.layers_pattern = _name_list("layers_pattern", self.layers_pattern)
            patterns = self.layers_pattern
            check_expressions("layers_pattern", [patterns] if isinstance(patterns, str) else patterns)
        if self.layers_to_transform is None:
            return
        if isinstance(self.target_modules, str) and self.target_modules.lower() not in (*PRESETS, "all-linear"):
            raise ConfigError(
                "layers_to_transform does nothing where target_modules is a regular expression; put the indices "
                "into the expression, or give target_modules as a list of names."
            )
        if not _is_whole(self.layers_to_transform, 0):
            self.layers_to_transform = _index_list(self.layers_to_transform)

    def _check_factors(self) -> None:
        if self.b1 is None:
            self.a1, self.a2 = _factor_pair("a1, a2", (ROWS_OF_A if self.a1 is None else self.a1, self.a2))
        elif self.a1 is not None:
            raise ConfigError(f"a1 ({self.a1!r}) and b1 ({self.b1!r}) both say how many rows A has; give one of them.")
        else:
            self.b1, self.a2 = _factor_pair("b1, a2", (self.b1, self.a2))
        if not _is_whole(self.num_terms, 1):
            raise ConfigError(f"num_terms must be a whole number of at least 1, not {self.num_terms!r}.")
        self.terms_pattern = _pattern_dict("terms_pattern", self.terms_pattern)
        for pattern, terms in self.terms_pattern.items():
            if not _is_whole(terms, 1):
                raise ConfigError(f"terms_pattern[{pattern!r}] must be a whole number of at least 1, not {terms!r}.")
        if self.b_rank is not None and not _is_whole(self.b_rank, 1):
            raise ConfigError(f"b_rank must be a whole number of at least 1, or None, not {self.b_rank!r}.")
        if self.layout not in get_args(Layout):
            raise ConfigError(f"layout must be one of {', '.join(get_args(Layout))}, not {self.layout!r}.")
        # JSON has no tuples, so a config that was saved comes back with lists.
        self.factor_pattern = {
            pattern: _factor_pair(f"factor_pattern[{pattern!r}]", pair)
            for pattern, pair in _pattern_dict("factor_pattern", self.factor_pattern).items()
        }

    def _check_scales(self) -> None:
        if self.scaling not in get_args(Scaling):
            raise ConfigError(f"scaling must be one of {', '.join(get_args(Scaling))}, not {self.scaling!r}.")
        self.alpha_pattern = _pattern_dict("alpha_pattern", self.alpha_pattern)
        named = {f"alpha_pattern[{pattern!r}]": alpha for pattern, alpha in self.alpha_pattern.items()}
        for name, value in {"alpha": self.alpha, **named}.items():
            if not _is_number(value) or not abs(value) <= sys.float_info.max:
                raise ConfigError(f"{name} must be a finite number, not {value!r}.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, not {self.dropout!r}.")

    def _check_init(self) -> None:
        for name, value in (("init_a", self.init_a), ("init_b", self.init_b)):
            if value not in get_args(Init):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(Init))}, not {value!r}.")
        if not isinstance(self.init_weights, bool):
            raise ConfigError(f"init_weights must be True or False, not {self.init_weights!r}.")
        if self.init_weights and self.init_a == self.init_b == "zeros":
            raise ConfigError(
                "init_a and init_b are both zeros: every gradient would be zero. Make one of them random."
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, sets as sorted lists, so that equal configs are saved as equal bytes."""
        values: dict[str, Any] = {k: sorted(v) if isinstance(v, set) else v for k, v in asdict(self).items()}
        # The first pattern that matches counts, and PEFT sorts the keys of what it saves: pairs keep their order.
        for name in ("factor_pattern", "alpha_pattern", "terms_pattern"):
            values[name] = [list(pair) for pair in values[name].items()]
        return values


def _names(field_name: str, value: Iterable[str] | str | None) -> set[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value not in PRESETS:
            check_expressions(field_name, [value], whole=True)
        return value
    return set(_name_list(field_name, value))


def _name_list(field_name: str, value: object) -> list[str]:
    if isinstance(value, Iterable) and not isinstance(value, str):
        names = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else list(value)
        if all(isinstance(name, str) for name in names):
            return names
    raise ConfigError(f"{field_name} must be a list of names, not {value!r}.")


def _index_list(value: object) -> list[int]:
    if isinstance(value, Iterable) and not isinstance(value, str):
        indices = list(value)
        if all(_is_whole(index, 0) for index in indices):
            return indices
    raise ConfigError(f"layers_to_transform must be one or more layer indices of at least 0, not {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _factor_pair(name: str, pair: object) -> tuple[int, int]:
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        a1, a2 = pair
        if _is_whole(a1, 1) and _is_whole(a2, 1):
            return a1, a2
    raise ConfigError(f"{name} must be two whole numbers of at least 1, not {pair!r}.")


def _pattern_dict(name: str, patterns: object) -> dict[str, Any]:
    pairs = list(patterns.items()) if isinstance(patterns, Mapping) else patterns
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ConfigError(f"{name} must map regular expressions to values, not be {patterns!r}.")
    for pattern, _ in pairs:
        if not isinstance(pattern, str):
            raise ConfigError(f"{name} has {pattern!r}, which is not a regular expression written as text.")
    check_expressions(name, [pattern for pattern, _ in pairs])
    return dict(pairs)
