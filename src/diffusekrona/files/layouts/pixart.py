"""PixArt-α and PixArt-Σ, as their own checkpoints have them."""

from .layout import Layout, fused

_EMBEDDERS = {"t_embedder": "timestep", "csize_embedder": "resolution", "ar_embedder": "aspect_ratio"}
_OWN, _BLOCK = "blocks.{}.", "transformer_blocks.{}."

PIXART = Layout(
    "pixart",
    "PixArt",
    ("PixArtTransformer2DModel",),
    {
        "x_embedder.proj": "pos_embed.proj",
        **{f"{own}.mlp.0": f"adaln_single.emb.{name}_embedder.linear_1" for own, name in _EMBEDDERS.items()},
        **{f"{own}.mlp.2": f"adaln_single.emb.{name}_embedder.linear_2" for own, name in _EMBEDDERS.items()},
        "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        f"{_OWN}attn.qkv": fused(f"{_BLOCK}attn1.", "to_q", "to_k", "to_v"),
        f"{_OWN}attn.proj": f"{_BLOCK}attn1.to_out.0",
        f"{_OWN}cross_attn.q_linear": f"{_BLOCK}attn2.to_q",
        f"{_OWN}cross_attn.kv_linear": fused(f"{_BLOCK}attn2.", "to_k", "to_v"),
        f"{_OWN}cross_attn.proj": f"{_BLOCK}attn2.to_out.0",
        f"{_OWN}mlp.fc1": f"{_BLOCK}ff.net.0.proj",
        f"{_OWN}mlp.fc2": f"{_BLOCK}ff.net.2",
        "final_layer.linear": "proj_out",
    },
    # Its attention could be Sana's. Its other layers are in more models, but for two embedders that only α has.
    signs=(r"(csize|ar)_embedder[._]mlp", r"adaln_single[._]emb[._](resolution|aspect_ratio)_embedder"),
)
