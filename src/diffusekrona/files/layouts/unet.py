"""UNets of Stable Diffusion 1.x, 2.x and XL, as the checkpoints of CompVis and Stability AI have them.

The original names follow from the blocks: each ResNet of the way down is an input block of its own, with the
transformer beside it second in it; so is each downsampler; on the way up, an upsampler comes last in an output block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_names(unet: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Layer of a UNet → its name in the original checkpoints, for those that have one there."""
    blocks = dict(_original_blocks(unet))
    names = {name: _original_name(name, blocks) for name in layers}
    return {name: original for name, original in names.items() if original}


def _original_name(name: str, blocks: Mapping[str, str]) -> str | None:
    parts = name.split(".")
    block = next((start for n in (3, 4, 5) if (start := ".".join(parts[:n])) in blocks), None)
    if block is None:
        return _OUTSIDE_BLOCKS.get(name)
    inner = name[len(block) :].lstrip(".")
    inner = _IN_RESNET.get(inner, inner) if ".resnets." in block else inner
    return f"{blocks[block]}.{inner}".rstrip(".")


def _original_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """Each part of a UNet's blocks, by its name here and in the original checkpoint."""
    n = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(getattr(block, "resnets", ()))):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        if getattr(block, "downsamplers", None) is not None:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
            n += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    n = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(getattr(block, "resnets", ()))):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"
            n += 1
        place = 2 if hasattr(block, "attentions") else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{n - 1}.{place}.conv"


def is_unet(module: nn.Module) -> bool:
    """Whether a model is built like a UNet of Diffusers."""
    return all(hasattr(module, blocks) for blocks in ("down_blocks", "mid_block", "up_blocks"))


def is_sdxl_unet(module: nn.Module) -> bool:
    """Whether a UNet is conditioned on sizes, as Stable Diffusion XL's is."""
    return is_unet(module) and getattr(getattr(module, "config", None), "addition_embed_type", None) == "text_time"
