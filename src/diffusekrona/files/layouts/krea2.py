"""Krea 2, as Krea's checkpoints have it."""

from .layout import Layout

_BLOCKS = {
    "blocks.{}.": "transformer_blocks.{}.",
    "txtfusion.layerwise_blocks.{}.": "text_fusion.layerwise_blocks.{}.",
    "txtfusion.refiner_blocks.{}.": "text_fusion.refiner_blocks.{}.",
}
_IN_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.qknorm.knorm": "attn.norm_k",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
    "prenorm": "norm1",
    "postnorm": "norm2",
}

KREA2 = Layout(
    "krea2",
    "Krea 2",
    ("Krea2Transformer2DModel",),
    {
        "first": "img_in",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.0": "txt_in.norm",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
        **{own + part: name + inner for own, name in _BLOCKS.items() for part, inner in _IN_BLOCK.items()},
        "last.linear": "final_layer.linear",
        "last.norm": "final_layer.norm",
    },
    signs=(
        r"blocks[._]\d+[._]attn[._](w[qkvo]|to_gate)(?![a-z_])",
        r"txtfusion[._]|text_fusion[._]",
        r"transformer_blocks[._]\d+[._]ff[._](gate|up|down)(?![a-z_])",
    ),
)
