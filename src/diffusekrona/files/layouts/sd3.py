"""Stable Diffusion 3 and 3.5, as Stability AI's checkpoints have them."""

from .layout import HalvesSwapped, Layout, fused

_EMBEDDERS = {"t_embedder": "timestep_embedder", "y_embedder": "text_embedder"}
_IMAGE, _TEXT, _BLOCK = "joint_blocks.{}.x_block.", "joint_blocks.{}.context_block.", "transformer_blocks.{}."

SD3 = Layout(
    "sd3",
    "Stable Diffusion 3",
    ("SD3Transformer2DModel",),
    {
        "x_embedder.proj": "pos_embed.proj",
        **{f"{own}.mlp.0": f"time_text_embed.{name}.linear_1" for own, name in _EMBEDDERS.items()},
        **{f"{own}.mlp.2": f"time_text_embed.{name}.linear_2" for own, name in _EMBEDDERS.items()},
        # attn2 is in the first blocks of 3.5 medium.
        **{f"{_IMAGE}{attn}.qkv": fused(f"{_BLOCK}{attn}.", "to_q", "to_k", "to_v") for attn in ("attn", "attn2")},
        **{f"{_IMAGE}{attn}.proj": f"{_BLOCK}{attn}.to_out.0" for attn in ("attn", "attn2")},
        **{f"{_IMAGE}{attn}.ln_q": f"{_BLOCK}{attn}.norm_q" for attn in ("attn", "attn2")},
        **{f"{_IMAGE}{attn}.ln_k": f"{_BLOCK}{attn}.norm_k" for attn in ("attn", "attn2")},
        f"{_IMAGE}adaLN_modulation.1": f"{_BLOCK}norm1.linear",
        f"{_IMAGE}mlp.fc1": f"{_BLOCK}ff.net.0.proj",
        f"{_IMAGE}mlp.fc2": f"{_BLOCK}ff.net.2",
        f"{_TEXT}attn.qkv": fused(f"{_BLOCK}attn.", "add_q_proj", "add_k_proj", "add_v_proj"),
        f"{_TEXT}attn.proj": f"{_BLOCK}attn.to_add_out",
        f"{_TEXT}attn.ln_q": f"{_BLOCK}attn.norm_added_q",
        f"{_TEXT}attn.ln_k": f"{_BLOCK}attn.norm_added_k",
        # The last block ends at the attention for the text, with nothing but a shift and a scale before it.
        f"{_TEXT}adaLN_modulation.1": HalvesSwapped(f"{_BLOCK}norm1_context.linear", unless=f"{_BLOCK}ff_context"),
        f"{_TEXT}mlp.fc1": f"{_BLOCK}ff_context.net.0.proj",
        f"{_TEXT}mlp.fc2": f"{_BLOCK}ff_context.net.2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": HalvesSwapped("norm_out.linear"),
    },
    signs=(r"joint_blocks[._]\d+[._](x|context)_block",),
)
