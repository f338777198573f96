"""Wan 2.1 and 2.2, as Alibaba's checkpoints have them, with VACE and Animate; SkyReels V2 and ChronoEdit too."""

from .layout import Entry, Layout, fused

_EMBEDDER = "condition_embedder."
_IMAGE = f"{_EMBEDDER}image_embedder."
_ATTENTIONS = {"self_attn.": "attn1.", "cross_attn.": "attn2."}
_IN_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_FACE, _MOTION = "face_adapter.fuser_blocks.{}.", "motion_encoder.enc.net_app.convs."


def _block(own: str) -> dict[str, Entry]:
    return {
        **{
            f"{own}{attention}{layer}": f"{own}{there}{name}"
            for attention, there in _ATTENTIONS.items()
            for layer, name in _IN_ATTENTION.items()
        },
        # What models have that are given a first or last image.
        f"{own}cross_attn.k_img": f"{own}attn2.add_k_proj",
        f"{own}cross_attn.v_img": f"{own}attn2.add_v_proj",
        f"{own}cross_attn.norm_k_img": f"{own}attn2.norm_added_k",
        # Alibaba numbers the norms as they were added, Diffusers as they are passed.
        f"{own}norm3": f"{own}norm2",
        f"{own}ffn.0": f"{own}ffn.net.0.proj",
        f"{own}ffn.2": f"{own}ffn.net.2",
    }


WAN = Layout(
    "wan",
    "Wan",
    (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    {
        "time_embedding.0": f"{_EMBEDDER}time_embedder.linear_1",
        "time_embedding.2": f"{_EMBEDDER}time_embedder.linear_2",
        "time_projection.1": f"{_EMBEDDER}time_proj",
        "text_embedding.0": f"{_EMBEDDER}text_embedder.linear_1",
        "text_embedding.2": f"{_EMBEDDER}text_embedder.linear_2",
        "img_emb.proj.0": f"{_IMAGE}norm1",
        "img_emb.proj.1": f"{_IMAGE}ff.net.0.proj",
        "img_emb.proj.3": f"{_IMAGE}ff.net.2",
        "img_emb.proj.4": f"{_IMAGE}norm2",
        **_block("blocks.{}."),
        "head.head": "proj_out",
        # VACE
        **_block("vace_blocks.{}."),
        "vace_blocks.{}.before_proj": "vace_blocks.{}.proj_in",
        "vace_blocks.{}.after_proj": "vace_blocks.{}.proj_out",
        # Animate
        f"{_FACE}linear1_q": "face_adapter.{}.to_q",
        f"{_FACE}linear1_kv": fused("face_adapter.{}.", "to_k", "to_v"),
        f"{_FACE}linear2": "face_adapter.{}.to_out",
        f"{_FACE}q_norm": "face_adapter.{}.norm_q",
        f"{_FACE}k_norm": "face_adapter.{}.norm_k",
        **{f"face_encoder.{name}.conv": f"face_encoder.{name}" for name in ("conv1_local", "conv2", "conv3")},
        f"{_MOTION}0.0": "motion_encoder.conv_in",
        **{f"{_MOTION}{n + 1}.conv1.0": f"motion_encoder.res_blocks.{n}.conv1" for n in range(7)},
        **{f"{_MOTION}{n + 1}.conv2.1": f"motion_encoder.res_blocks.{n}.conv2" for n in range(7)},
        **{f"{_MOTION}{n + 1}.skip.1": f"motion_encoder.res_blocks.{n}.conv_skip" for n in range(7)},
        f"{_MOTION}8": "motion_encoder.conv_out",
        "motion_encoder.enc.fc.{}": "motion_encoder.motion_network.{}",
        # SkyReels
        "fps_projection.0": "fps_projection.net.0.proj",
        "fps_projection.2": "fps_projection.net.2",
    },
    signs=(r"blocks[._]\d+[._](self|cross)_attn[._][qkvo](?![a-z_])", r"vace_blocks[._]\d"),
)
