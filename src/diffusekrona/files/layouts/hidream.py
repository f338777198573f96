"""HiDream-I1: its checkpoints, and with them all programs, have the names of Diffusers."""

from .layout import Layout

HIDREAM = Layout(
    "hidream",
    "HiDream-I1",
    ("HiDreamImageTransformer2DModel",),
    signs=(r"(double|single)_stream_blocks[._]\d+[._]block[._]",),
)
