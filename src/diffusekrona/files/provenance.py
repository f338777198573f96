"""Where a file comes from and what it was made for, as far as its header and its tensors' names tell."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping

from ..tuner.names import PEFT_PREFIX
from .formats.scales import HEADER
from .layouts.names import made_for

_NAMINGS = {
    "lycoris_": "LyCORIS' names",
    "lora_transformer_": "OneTrainer's names",
    "lora_unet_": "kohya's names",
    "lora_te": "kohya's names",
    "oft_unet_": "kohya's names",
    "diffusion_model.": "ComfyUI's names, which ai-toolkit and others write",
    "model.diffusion_model.": "ComfyUI's names",
    "text_encoders.": "ComfyUI's names",
    PEFT_PREFIX: "PEFT's names",
    "unet.": "Diffusers' names",
    "transformer.": "Diffusers' names",
    "text_encoder": "Diffusers' names",
}
"""How a layer's name begins → whose names these are."""

_KOHYA_MODULES = {
    "lycoris.kohya": "LyCORIS",
    "networks.lora_wan": "musubi-tuner",
    "networks.lora_hunyuan": "musubi-tuner",
    "networks.lora_framepack": "musubi-tuner",
    "networks.lora_qwen_image": "musubi-tuner",
    "networks.lora_zimage": "musubi-tuner",
    "networks.lora_flux_kontext": "musubi-tuner",
    "networks.lora_flux_2": "musubi-tuner",
    "networks.": "kohya's sd-scripts or a program of their kind",
}
"""How `ss_network_module` begins, most telling first → the program."""

_OTHER_FILES = {
    r"^model\.diffusion_model\.|^conditioner\.|^cond_stage_model\.": "a whole checkpoint",
    r"^(emb_params|string_to_param|bundle_emb\.)|^clip_[lg]$": "embeddings of new words (textual inversion)",
    r"^(ip_adapter|image_proj)\.": "an IP-Adapter",
    r"^(control_model\.|controlnet_|input_hint_block|control_add_embedding)": "a ControlNet",
    r"^(encoder|decoder)\.(down|up|mid|conv_in|mid_block|down_blocks|up_blocks)": "an autoencoder",
    r"^(text_model|encoder\.(block|layers)|embeddings\.token_embedding|model\.layers|shared)\b": "a text encoder",
    r"^(down_blocks|up_blocks|input_blocks|output_blocks|transformer_blocks|double_blocks|single_blocks|layers|blocks|"
    r"joint_blocks)\.": "a denoiser's weights",
}
"""What a tensor's name has in it, most telling first → what a file is that holds no adapter."""


KNOWN_OTHERS = tuple(_OTHER_FILES.values())


def made_by(metadata: Mapping[str, str], layers: Collection[str]) -> str | None:
    """The program that wrote a file; None if nothing tells.

    Args:
        metadata: the file's header.
        layers: names of its layers.
    """
    software = _json(metadata.get("software"))
    if software.get("name"):
        return " ".join(str(software[key]) for key in ("name", "version") if software.get(key))
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer"
    module = metadata.get("ss_network_module", "")
    known = next((program for start, program in _KOHYA_MODULES.items() if module.startswith(start)), None)
    if known:
        return known
    config = _json(metadata.get(HEADER))
    if config or any(name.startswith(PEFT_PREFIX) for name in layers):
        version = config.get("peft_version") or next((v for k, v in config.items() if k.endswith("peft_version")), None)
        return f"PEFT {version}" if version else "PEFT, perhaps through Diffusers"
    return metadata.get("modelspec.implementation") or None


def naming_of(layers: Collection[str]) -> str:
    """Whose names most layers of a file have."""
    counts: dict[str, int] = {}
    for layer in layers:
        naming = next(
            (naming for start, naming in _NAMINGS.items() if layer.startswith(start)), "the model's own names"
        )
        counts[naming] = counts.get(naming, 0) + 1
    return max(counts, key=lambda naming: counts[naming])


def made_for_model(layers: Collection[str]) -> str | None:
    """The model that a file's layers look made for, by its denoiser's if it has any; None if they do not tell."""
    of_denoiser = [name for name in layers if not re.match(r"(lora_te|text_encoder)", name)]
    return made_for(of_denoiser) or made_for(layers)


def not_an_adapter(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str | None]:
    """What a file is that holds no adapter, and which model it looks made for.

    Args:
        shapes: of its tensors by name.
    """
    what = next(
        (what for sign, what in _OTHER_FILES.items() if any(re.search(sign, name) for name in shapes)),
        "tensors of no kind that is known here",
    )
    total = sum(math.prod(shape) for shape in shapes.values())
    layers = [name.rpartition(".")[0] for name in shapes]
    has_denoiser = what in ("a whole checkpoint", "a denoiser's weights")
    return f"{what}: {len(shapes):,} tensors, {total:,} numbers", made_for(layers) if has_denoiser else None


def _json(text: str | None) -> dict[str, object]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
