"""Chroma, as its own checkpoints and ComfyUI's have it: FLUX.1 with a network in place of the modulations."""

from .flux import FLUX
from .layout import Layout

_APPROXIMATOR = "distilled_guidance_layer.layers.{}."

CHROMA = Layout(
    "chroma",
    "Chroma",
    ("ChromaTransformer2DModel",),
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        f"{_APPROXIMATOR}in_layer": f"{_APPROXIMATOR}linear_1",
        f"{_APPROXIMATOR}out_layer": f"{_APPROXIMATOR}linear_2",
        # The blocks are those of FLUX.1 without the layers called "lin", which are its modulations.
        **{name: entry for name, entry in FLUX.table.items() if "_blocks." in name and not name.endswith(".lin")},
        "final_layer.linear": "proj_out",
    },
    # Its blocks by themselves could be FLUX.1's.
    signs=(r"distilled_guidance_layer",),
)
