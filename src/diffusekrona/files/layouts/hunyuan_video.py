"""HunyuanVideo, as Tencent's checkpoints have it; FramePack, whose own names are Diffusers', is made of it."""

from .layout import Entry, HalvesSwapped, Layout, fused

_TEXT = "context_embedder."
_REFINER, _IN_REFINER = "txt_in.individual_token_refiner.blocks.{}.", f"{_TEXT}token_refiner.refiner_blocks.{{}}."
_DOUBLE, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."

_TABLE: dict[str, Entry] = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": f"{_TEXT}proj_in",
    "txt_in.t_embedder.mlp.0": f"{_TEXT}time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": f"{_TEXT}time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": f"{_TEXT}time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": f"{_TEXT}time_text_embed.text_embedder.linear_2",
    f"{_REFINER}self_attn_qkv": fused(f"{_IN_REFINER}attn.", "to_q", "to_k", "to_v"),
    f"{_REFINER}self_attn_proj": f"{_IN_REFINER}attn.to_out.0",
    f"{_REFINER}norm1": f"{_IN_REFINER}norm1",
    f"{_REFINER}norm2": f"{_IN_REFINER}norm2",
    f"{_REFINER}mlp.fc1": f"{_IN_REFINER}ff.net.0.proj",
    f"{_REFINER}mlp.fc2": f"{_IN_REFINER}ff.net.2",
    f"{_REFINER}adaLN_modulation.1": f"{_IN_REFINER}norm_out.linear",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "double_blocks.{}.img_mod.linear": f"{_DOUBLE}norm1.linear",
    "double_blocks.{}.txt_mod.linear": f"{_DOUBLE}norm1_context.linear",
    "double_blocks.{}.img_attn_qkv": fused(f"{_DOUBLE}attn.", "to_q", "to_k", "to_v"),
    "double_blocks.{}.txt_attn_qkv": fused(f"{_DOUBLE}attn.", "add_q_proj", "add_k_proj", "add_v_proj"),
    "double_blocks.{}.img_attn_q_norm": f"{_DOUBLE}attn.norm_q",
    "double_blocks.{}.img_attn_k_norm": f"{_DOUBLE}attn.norm_k",
    "double_blocks.{}.txt_attn_q_norm": f"{_DOUBLE}attn.norm_added_q",
    "double_blocks.{}.txt_attn_k_norm": f"{_DOUBLE}attn.norm_added_k",
    "double_blocks.{}.img_attn_proj": f"{_DOUBLE}attn.to_out.0",
    "double_blocks.{}.txt_attn_proj": f"{_DOUBLE}attn.to_add_out",
    "double_blocks.{}.img_mlp.fc1": f"{_DOUBLE}ff.net.0.proj",
    "double_blocks.{}.img_mlp.fc2": f"{_DOUBLE}ff.net.2",
    "double_blocks.{}.txt_mlp.fc1": f"{_DOUBLE}ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.fc2": f"{_DOUBLE}ff_context.net.2",
    "single_blocks.{}.linear1": fused(_SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "single_blocks.{}.linear2": f"{_SINGLE}proj_out",
    "single_blocks.{}.modulation.linear": f"{_SINGLE}norm.linear",
    "single_blocks.{}.q_norm": f"{_SINGLE}attn.norm_q",
    "single_blocks.{}.k_norm": f"{_SINGLE}attn.norm_k",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": HalvesSwapped("norm_out.linear"),
}

# ComfyUI renames what it reads to the names of FLUX.1, and so saves it.
_IN_COMFYUI = (
    ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.in_layer"),
    ("txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer"),
    ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("_attn_q_norm", "_attn.norm.query_norm"),
    ("_attn_k_norm", "_attn.norm.key_norm"),
    (".q_norm", ".norm.query_norm"),
    (".k_norm", ".norm.key_norm"),
    ("_mod.linear", "_mod.lin"),
    ("modulation.linear", "modulation.lin"),
)


def _in_comfyui(name: str) -> str:
    for own, there in _IN_COMFYUI:
        name = name.replace(own, there)
    return name


HUNYUAN_VIDEO = Layout(
    "hunyuan-video",
    "HunyuanVideo",
    ("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
    _TABLE,
    also={_in_comfyui(name): entry for name, entry in _TABLE.items() if _in_comfyui(name) != name},
    # With underscores for dots, a name is FLUX.1's, HunyuanImage's or HunyuanVideo 1.5's as well.
    signs=(r"double_blocks\.\d+\.(img|txt)_attn_qkv",),
)
