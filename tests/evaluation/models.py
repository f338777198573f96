"""Tiny CLIP, ViT and DINOv2 models with random weights, in folders as the hub's are.

Their image processors are written in the words of the published ones, old and new, with 32 pixels for 224.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, PreTrainedModel, ViTConfig, ViTModel

from tests.pipelines import tiny_sd_pipeline

SIDE = 32
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

_SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGES: dict[str, Any] = {"image_size": SIDE, "patch_size": 8, "initializer_range": 0.2}


def save_clip(folder: Path) -> Path:
    """A CLIP model of 77 tokens, with tokenizer and processor."""
    tokenizer = tiny_sd_pipeline().tokenizer
    text = {
        **_SHAPE,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # Random weights are so small by default that all images look alike to them.
    config = CLIPConfig(text_config=text, vision_config=_SHAPE | _IMAGES, projection_dim=24, initializer_factor=8.0)
    tokenizer.save_pretrained(folder)
    processor = {
        "crop_size": SIDE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
        "size": SIDE,
    }
    return _save(folder, CLIPModel, config, processor)


def save_vit(folder: Path) -> Path:
    """A ViT as facebook/dino-vits16 is one."""
    processor = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "resample": 2,
        "size": SIDE,
    }
    return _save(folder, ViTModel, ViTConfig(**_SHAPE, **_IMAGES), processor)


def save_dinov2(folder: Path) -> Path:
    """A DINOv2 model as facebook/dinov2-small is one."""
    config = Dinov2Config(**_SHAPE | {"mlp_ratio": 2}, **_IMAGES)
    processor = {
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": IMAGENET_MEAN,
        "image_processor_type": "BitImageProcessor",
        "image_std": IMAGENET_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": SIDE + 4},
    }
    return _save(folder, Dinov2Model, config, processor)


def _save(folder: Path, kind: type[PreTrainedModel], config: Any, processor: dict[str, Any]) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
