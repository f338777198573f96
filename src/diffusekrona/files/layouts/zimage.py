"""Z-Image, as ComfyUI's checkpoints have it; Alibaba's have the names of Diffusers."""

from .layout import Layout, fused

_BLOCKS = ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}.", "siglip_refiner.{}.")

ZIMAGE = Layout(
    "zimage",
    "Z-Image",
    ("ZImageTransformer2DModel",),
    {
        # Diffusers names these two by the sides of the patches in space and time, which are 2 and 1 in all models.
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **{f"{block}attention.qkv": fused(f"{block}attention.", "to_q", "to_k", "to_v") for block in _BLOCKS},
        **{f"{block}attention.out": f"{block}attention.to_out.0" for block in _BLOCKS},
        **{f"{block}attention.q_norm": f"{block}attention.norm_q" for block in _BLOCKS},
        **{f"{block}attention.k_norm": f"{block}attention.norm_k" for block in _BLOCKS},
    },
    # Its attention could be Lumina 2's if fused, otherwise Ideogram 4's.
    signs=(r"(layers|noise_refiner)[._]\d+[._]adaLN_modulation[._]0", r"all_(x_embedder|final_layer)[._]2-1"),
)
