"""What can be chosen about an adapter: types, defaults and help, for `KronAConfig` and for the settings of a training.

Neither torch nor PEFT is imported, so that a command shows its flags at once.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Init = Literal["zeros", "normal", "normal_sqrt", "kaiming_uniform", "xavier_uniform"]

Scaling = Literal["alpha", "cdka"]
"""What the scale s is: alpha, or alpha / √(num_terms · a2), as CDKA has it (arXiv 2602.01267)."""

ROWS_OF_A = 4
"""a1 where neither a1 nor b1 is given."""

ATTENTION = "attention"
PRESETS = (ATTENTION, "attention+ff", "cross-attention")
"""Words that `target_modules` may be; `targets.py` says what they mean in a model."""


class AdapterField(NamedTuple):
    """One choice.

    Attributes:
        default: its value where nothing is chosen.
        help: one or more whole sentences.
    """

    default: Any
    help: str


FIELDS = {
    "a1": AdapterField(
        None,
        f"Rows of A; they must divide the outputs of every adapted layer. By default {ROWS_OF_A}, or what b1 leaves.",
    ),
    "b1": AdapterField(
        None, "Rows of B in place of a1, the same in every adapted layer; with b1 and a2 of 1, the update is a LoRA."
    ),
    "a2": AdapterField(64, "Columns of A; they must divide the inputs of every adapted layer."),
    "alpha": AdapterField(1.0, "Scale s of the update s · A ⊗ B, or what scaling makes it of."),
    "scaling": AdapterField(
        "alpha", 'What the scale is: "alpha" itself, or "cdka" for alpha / √(num_terms · a2), as CDKA has it.'
    ),
    "num_terms": AdapterField(1, "Number of Kronecker products that are summed, each with factors of its own."),
    "b_rank": AdapterField(None, "Rank of B as a product of two matrices, as in LoKr; by default B is one matrix."),
    "target_modules": AdapterField(
        ATTENTION,
        'Layers to adapt: "attention", "attention+ff", "cross-attention", or a regular expression that matches their '
        "whole names.",
    ),
    "dropout": AdapterField(0.0, "Probability of zeroing each input of the update while training."),
    "init_a": AdapterField("normal", "Initial values of A."),
    "init_b": AdapterField("zeros", "Initial values of B; with zeros a fresh adapter changes nothing."),
}
"""By the names that they have in `KronAConfig`."""
