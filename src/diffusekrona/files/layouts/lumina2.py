"""Lumina-Image 2.0, as Alpha-VLLM's checkpoints have it."""

from .layout import Layout, fused

_EMBEDDER = "time_caption_embed."
_MODULATED = ("layers.{}.", "noise_refiner.{}.")
_BLOCKS = (*_MODULATED, "context_refiner.{}.")

LUMINA2 = Layout(
    "lumina2",
    "Lumina-Image 2.0",
    ("Lumina2Transformer2DModel",),
    {
        "t_embedder.mlp.0": f"{_EMBEDDER}timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{_EMBEDDER}timestep_embedder.linear_2",
        "cap_embedder.0": f"{_EMBEDDER}caption_embedder.0",
        "cap_embedder.1": f"{_EMBEDDER}caption_embedder.1",
        # Keys and values have fewer heads than queries.
        **{f"{block}attention.qkv": fused(f"{block}attn.", "to_q", "to_k", "to_v") for block in _BLOCKS},
        **{f"{block}attention.out": f"{block}attn.to_out.0" for block in _BLOCKS},
        **{f"{block}attention.q_norm": f"{block}attn.norm_q" for block in _BLOCKS},
        **{f"{block}attention.k_norm": f"{block}attn.norm_k" for block in _BLOCKS},
        **{f"{block}feed_forward.w{n}": f"{block}feed_forward.linear_{n}" for block in _BLOCKS for n in (1, 2, 3)},
        **{f"{block}adaLN_modulation.1": f"{block}norm1.linear" for block in _MODULATED},
        **{f"{block}attention_norm1": f"{block}norm1.norm" for block in _MODULATED},
        "context_refiner.{}.attention_norm1": "context_refiner.{}.norm1",
        **{f"{block}attention_norm2": f"{block}norm2" for block in _BLOCKS},
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    },
    # Its attention could be Z-Image's.
    signs=(
        r"noise_refiner[._]\d+[._]adaLN_modulation[._]1",
        r"(layers|noise_refiner|context_refiner)[._]\d+[._]attn[._]to_(q|k|v|out)",
    ),
)
