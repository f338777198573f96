"""Qwen-Image and Qwen-Image-Edit: Alibaba's checkpoints, and with them all programs, have the names of Diffusers."""

from .layout import Layout

QWEN_IMAGE = Layout(
    "qwen-image",
    "Qwen-Image",
    ("QwenImageTransformer2DModel",),
    # Its attention could be another transformer's, its layers for images Nucleus' as well.
    signs=(r"transformer_blocks[._]\d+[._]txt_(mod[._]1|mlp[._]net)",),
)
