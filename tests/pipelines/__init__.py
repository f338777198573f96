"""Tiny pipelines with random weights, for tests that need a whole Stable Diffusion without a download.

All work on 32 x 32 images (latents 4 x 8 x 8) and are built in a fraction of a second. The weights come from
a seed, so two calls give equal pipelines. Every attention projection is 64 or 128 wide on either side, so the
default factors (a1, a2) = (4, 64) fit all of them, in the UNet or transformer and in the text encoders.
"""

from tests.pipelines.chroma import tiny_chroma_pipeline
from tests.pipelines.flux import packed, tiny_flux_pipeline
from tests.pipelines.flux2 import tiny_flux2_pipeline, tiny_klein_pipeline, tokens
from tests.pipelines.krea2 import tiny_krea2_pipeline
from tests.pipelines.parts import IMAGE_SIZE, TEXT_WIDTH, Tiny
from tests.pipelines.pixart import tiny_pixart_pipeline
from tests.pipelines.qwen_image import decoded_frame, tiny_qwen_image_pipeline
from tests.pipelines.sana import decoded_latent, tiny_sana_pipeline
from tests.pipelines.stable_diffusion import tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.pipelines.wan import as_video, decoded_video, tiny_wan_pipeline
from tests.pipelines.zimage import tiny_zimage_pipeline

FAMILIES = {
    "chroma": Tiny(tiny_chroma_pipeline, packed, packed),
    "flux": Tiny(tiny_flux_pipeline, packed, packed),
    "flux2": Tiny(tiny_flux2_pipeline, stepped=tokens),
    "klein": Tiny(tiny_klein_pipeline, stepped=tokens),
    "krea2": Tiny(tiny_krea2_pipeline, packed, packed, decoded_frame, options={"guidance_scale": 0.0}),
    "pixart": Tiny(tiny_pixart_pipeline),
    "qwen-image": Tiny(tiny_qwen_image_pipeline, packed, packed, decoded_frame),
    "sana": Tiny(tiny_sana_pipeline, decoded=decoded_latent, program="diffusers"),
    "sd": Tiny(tiny_sd_pipeline),
    "sd3": Tiny(tiny_sd3_pipeline),
    "sdxl": Tiny(tiny_sdxl_pipeline),
    "wan": Tiny(tiny_wan_pipeline, as_video, as_video, decoded_video, options={"num_frames": 1}),
    "z-image": Tiny(tiny_zimage_pipeline, options={"guidance_scale": 0.0}),
}
"""A pipeline of each family that can be trained."""

__all__ = [
    "FAMILIES",
    "IMAGE_SIZE",
    "TEXT_WIDTH",
    "tiny_chroma_pipeline",
    "tiny_flux2_pipeline",
    "tiny_flux_pipeline",
    "tiny_klein_pipeline",
    "tiny_krea2_pipeline",
    "tiny_pixart_pipeline",
    "tiny_qwen_image_pipeline",
    "tiny_sana_pipeline",
    "tiny_sd3_pipeline",
    "tiny_sd_pipeline",
    "tiny_sdxl_pipeline",
    "tiny_wan_pipeline",
    "tiny_zimage_pipeline",
]
