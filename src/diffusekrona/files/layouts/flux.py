"""FLUX.1, as Black Forest Labs' checkpoints have it."""

from .layout import HalvesSwapped, Layout, fused

_EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
_DOUBLE, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."

FLUX = Layout(
    "flux",
    "FLUX.1",
    ("FluxTransformer2DModel",),
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        **{f"{own}.in_layer": f"time_text_embed.{name}.linear_1" for own, name in _EMBEDDERS.items()},
        **{f"{own}.out_layer": f"time_text_embed.{name}.linear_2" for own, name in _EMBEDDERS.items()},
        "double_blocks.{}.img_attn.qkv": fused(f"{_DOUBLE}attn.", "to_q", "to_k", "to_v"),
        "double_blocks.{}.txt_attn.qkv": fused(f"{_DOUBLE}attn.", "add_q_proj", "add_k_proj", "add_v_proj"),
        "double_blocks.{}.img_attn.proj": f"{_DOUBLE}attn.to_out.0",
        "double_blocks.{}.txt_attn.proj": f"{_DOUBLE}attn.to_add_out",
        "double_blocks.{}.img_mod.lin": f"{_DOUBLE}norm1.linear",
        "double_blocks.{}.txt_mod.lin": f"{_DOUBLE}norm1_context.linear",
        "double_blocks.{}.img_mlp.0": f"{_DOUBLE}ff.net.0.proj",
        "double_blocks.{}.img_mlp.2": f"{_DOUBLE}ff.net.2",
        "double_blocks.{}.txt_mlp.0": f"{_DOUBLE}ff_context.net.0.proj",
        "double_blocks.{}.txt_mlp.2": f"{_DOUBLE}ff_context.net.2",
        "double_blocks.{}.img_attn.norm.query_norm": f"{_DOUBLE}attn.norm_q",
        "double_blocks.{}.img_attn.norm.key_norm": f"{_DOUBLE}attn.norm_k",
        "double_blocks.{}.txt_attn.norm.query_norm": f"{_DOUBLE}attn.norm_added_q",
        "double_blocks.{}.txt_attn.norm.key_norm": f"{_DOUBLE}attn.norm_added_k",
        "single_blocks.{}.linear1": fused(_SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single_blocks.{}.linear2": f"{_SINGLE}proj_out",
        "single_blocks.{}.modulation.lin": f"{_SINGLE}norm.linear",
        "single_blocks.{}.norm.query_norm": f"{_SINGLE}attn.norm_q",
        "single_blocks.{}.norm.key_norm": f"{_SINGLE}attn.norm_k",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": HalvesSwapped("norm_out.linear"),
    },
    # XLabs' trainer names what hangs on an attention processor.
    also={
        "double_blocks.{}.processor.qkv_lora1": fused(f"{_DOUBLE}attn.", "to_q", "to_k", "to_v"),
        "double_blocks.{}.processor.qkv_lora2": fused(f"{_DOUBLE}attn.", "add_q_proj", "add_k_proj", "add_v_proj"),
        "double_blocks.{}.processor.proj_lora1": f"{_DOUBLE}attn.to_out.0",
        "double_blocks.{}.processor.proj_lora2": f"{_DOUBLE}attn.to_add_out",
        # "qkv_lora.up.weight" may also be read as the layer "qkv" with the ending of older Diffusers.
        **{
            f"single_blocks.{{}}.processor.qkv{lora}": fused(f"{_SINGLE}attn.", "to_q", "to_k", "to_v")
            for lora in ("", "_lora")
        },
        **{f"single_blocks.{{}}.processor.proj{lora}": f"{_SINGLE}proj_out" for lora in ("", "_lora")},
    },
    # Attention and MLPs by themselves could be FLUX.2's or Chroma's, or with underscores for dots HunyuanVideo's.
    signs=(
        r"single_blocks[._]\d+[._]modulation[._]lin(?![a-z])",
        r"(double|single)_blocks\.\d+\.processor\.(qkv|proj)",
    ),
)
