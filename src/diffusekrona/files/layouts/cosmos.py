"""Cosmos-Predict2, as NVIDIA's checkpoints have it, and Anima, which is one."""

from .layout import Entry, Layout

_ATTENTIONS = {"self_attn.": "attn1.", "cross_attn.": "attn2."}
_IN_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_IN_IMAGE_ATTENTION = ("q_img", "k_img", "v_img", "q_img_norm", "k_img_norm")
_MODULATIONS = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}
_OWN, _BLOCK = "blocks.{}.", "transformer_blocks.{}."

_IN_BLOCK: dict[str, Entry] = {
    **{
        f"{_OWN}{attention}{layer}": f"{_BLOCK}{there}{name}"
        for attention, there in _ATTENTIONS.items()
        for layer, name in _IN_ATTENTION.items()
    },
    # 2.5 can look at images beside the text.
    **{f"{_OWN}cross_attn.{name}": f"{_BLOCK}attn2.{name}" for name in _IN_IMAGE_ATTENTION},
    **{f"{_OWN}adaln_modulation_{of}.1": f"{_BLOCK}{norm}.linear_1" for of, norm in _MODULATIONS.items()},
    **{f"{_OWN}adaln_modulation_{of}.2": f"{_BLOCK}{norm}.linear_2" for of, norm in _MODULATIONS.items()},
    f"{_OWN}mlp.layer1": f"{_BLOCK}ff.net.0.proj",
    f"{_OWN}mlp.layer2": f"{_BLOCK}ff.net.2",
}

COSMOS = Layout(
    "cosmos",
    "Cosmos-Predict2 or Anima",
    ("CosmosTransformer3DModel",),
    {
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "t_embedding_norm": "time_embed.norm",
        **_IN_BLOCK,
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
    },
    signs=(
        r"blocks[._]\d+[._](self|cross)_attn[._]output_proj",
        r"adaln_modulation_(self_attn|cross_attn|mlp)[._][12]",
    ),
)
