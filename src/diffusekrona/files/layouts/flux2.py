"""FLUX.2 [dev] and [klein], as Black Forest Labs' checkpoints have them."""

from .layout import HalvesSwapped, Layout, fused

_EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}
_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_DOUBLE, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."

FLUX2 = Layout(
    "flux2",
    "FLUX.2",
    ("Flux2Transformer2DModel",),
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        **{f"{own}.in_layer": f"time_guidance_embed.{name}.linear_1" for own, name in _EMBEDDERS.items()},
        **{f"{own}.out_layer": f"time_guidance_embed.{name}.linear_2" for own, name in _EMBEDDERS.items()},
        **{f"{name}.lin": f"{name}.linear" for name in _MODULATIONS},
        "double_blocks.{}.img_attn.qkv": fused(f"{_DOUBLE}attn.", "to_q", "to_k", "to_v"),
        "double_blocks.{}.txt_attn.qkv": fused(f"{_DOUBLE}attn.", "add_q_proj", "add_k_proj", "add_v_proj"),
        "double_blocks.{}.img_attn.proj": f"{_DOUBLE}attn.to_out.0",
        "double_blocks.{}.txt_attn.proj": f"{_DOUBLE}attn.to_add_out",
        "double_blocks.{}.img_attn.norm.query_norm": f"{_DOUBLE}attn.norm_q",
        "double_blocks.{}.img_attn.norm.key_norm": f"{_DOUBLE}attn.norm_k",
        "double_blocks.{}.txt_attn.norm.query_norm": f"{_DOUBLE}attn.norm_added_q",
        "double_blocks.{}.txt_attn.norm.key_norm": f"{_DOUBLE}attn.norm_added_k",
        "double_blocks.{}.img_mlp.0": f"{_DOUBLE}ff.linear_in",
        "double_blocks.{}.img_mlp.2": f"{_DOUBLE}ff.linear_out",
        "double_blocks.{}.txt_mlp.0": f"{_DOUBLE}ff_context.linear_in",
        "double_blocks.{}.txt_mlp.2": f"{_DOUBLE}ff_context.linear_out",
        "single_blocks.{}.linear1": f"{_SINGLE}attn.to_qkv_mlp_proj",
        "single_blocks.{}.linear2": f"{_SINGLE}attn.to_out",
        "single_blocks.{}.norm.query_norm": f"{_SINGLE}attn.norm_q",
        "single_blocks.{}.norm.key_norm": f"{_SINGLE}attn.norm_k",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": HalvesSwapped("norm_out.linear"),
    },
    signs=(
        r"double_stream_modulation_(img|txt)[._]lin|single_stream_modulation[._]lin",
        # FLUX.1, Chroma and HunyuanVideo have at most 40 single blocks, [dev] has 48.
        r"single_blocks[._]4[0-7][._]linear[12]",
        r"attn[._]to_qkv_mlp_proj",
        r"(?<!single_)transformer_blocks[._]\d+[._]ff(_context)?[._]linear_(in|out)",
    ),
)
