"""Sana, as NVIDIA's checkpoints have it, for images and videos."""

from .layout import Layout, fused

_ATTENTIONS = {"attn": "attn1", "cross_attn": "attn2"}
_CONVOLUTIONS = ("inverted", "depth", "point")
_OWN, _BLOCK = "blocks.{}.", "transformer_blocks.{}."

SANA = Layout(
    "sana",
    "Sana",
    ("SanaTransformer2DModel", "SanaVideoTransformer3DModel"),
    {
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
        "t_block.1": "time_embed.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "attention_y_norm": "caption_norm",
        f"{_OWN}attn.qkv": fused(f"{_BLOCK}attn1.", "to_q", "to_k", "to_v"),
        f"{_OWN}cross_attn.q_linear": f"{_BLOCK}attn2.to_q",
        f"{_OWN}cross_attn.kv_linear": fused(f"{_BLOCK}attn2.", "to_k", "to_v"),
        **{f"{_OWN}{own}.proj": f"{_BLOCK}{name}.to_out.0" for own, name in _ATTENTIONS.items()},
        **{f"{_OWN}{own}.q_norm": f"{_BLOCK}{name}.norm_q" for own, name in _ATTENTIONS.items()},
        **{f"{_OWN}{own}.k_norm": f"{_BLOCK}{name}.norm_k" for own, name in _ATTENTIONS.items()},
        **{f"{_OWN}mlp.{name}_conv.conv": f"{_BLOCK}ff.conv_{name}" for name in _CONVOLUTIONS},
        f"{_OWN}mlp.t_conv": f"{_BLOCK}ff.conv_temp",
        "final_layer.linear": "proj_out",
    },
    also={
        # Sprint, which is told the scale of the guidance
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
        "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
        # Videos
        "x_embedder.proj": "patch_embedding",
    },
    signs=(
        r"blocks[._]\d+[._]mlp[._](inverted|depth|point)_conv",
        r"transformer_blocks[._]\d+[._]ff[._]conv_(inverted|depth|point)",
    ),
)
