"""Anima's text conditioner: a part of the transformer in ComfyUI's checkpoints, in Diffusers a model of its own.

Files of Anima can hold its layers beside those of the transformer, whose layout is Cosmos'.
"""

from .layout import Layout

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_BLOCK = (
    *(f"blocks.{{}}.{attention}.{layer}" for attention in ("self_attn", "cross_attn") for layer in _ATTENTION),
    *(f"blocks.{{}}.{layer}" for layer in ("norm_self_attn", "norm_cross_attn", "norm_mlp", "mlp.0", "mlp.2")),
)

ANIMA_TEXT = Layout(
    "anima-text",
    "Anima's text conditioner",
    ("AnimaTextConditioner",),
    {f"llm_adapter.{name}": name for name in ("embed", *_BLOCK, "norm", "out_proj")},
    signs=(r"llm_adapter[._]",),
)
