"""A tiny FLUX.2 and a tiny FLUX.2 klein."""

from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from tests.pipelines.parts import IMAGE_SIZE, seeded
from tests.pipelines.qwen import qwen3, sizes, tokenizer

_WIDTH = 32
# The system's message is not part of it: it is longer than all prompts, and a model this small would hear only that.
_TEMPLATE = "{% for message in messages[1:] %}<|im_start|>{{ message.content[0].text }}<|im_end|>{% endfor %}"


def tiny_flux2_pipeline(seed: int = 0) -> Flux2Pipeline:
    """A `Flux2Pipeline` whose transformer is told of guidance."""
    return seeded(seed, _build_flux2)


def tiny_klein_pipeline(seed: int = 0) -> Flux2KleinPipeline:
    """A `Flux2KleinPipeline`, not distilled."""
    return seeded(seed, _build_klein)


def _build_flux2() -> Flux2Pipeline:
    text = {"model_type": "mistral", **sizes(30, _WIDTH)}
    vision = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"intermediate_size": 16, "image_size": 32, "patch_size": 16}
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    pipe = Flux2Pipeline(text_encoder=encoder.eval(), tokenizer=tokenizer(_TEMPLATE), **_parts(guidance_embeds=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build_klein() -> Flux2KleinPipeline:
    pipe = Flux2KleinPipeline(text_encoder=qwen3(27, _WIDTH), tokenizer=tokenizer(), **_parts(guidance_embeds=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _parts(guidance_embeds: bool) -> dict[str, Any]:
    """What both pipelines have."""
    transformer = Flux2Transformer2DModel(
        in_channels=4 * 4,  # latents in patches of 2 x 2
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=3 * _WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    for modulation in (
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
    ):
        modulation.linear.weight.data *= 10  # a new one's gates are all but closed
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer.eval(), "vae": _vae(), "scheduler": scheduler}


def _vae() -> AutoencoderKLFlux2:
    """Latents are a quarter of the image on each side; each channel of their patches has its mean and variance."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    ).eval()
    vae.bn.running_mean.normal_(0, 0.1)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def tokens(pipe: Any, latents: Tensor) -> Tensor:
    """Patches as FLUX.2's pipelines put them one after the other."""
    found: Tensor = pipe._pack_latents(latents)
    return found
