"""Tiny transformers of each family, with random weights."""

import diffusers
import torch
from torch import nn

_FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "in_channels": 4,
    "axes_dims_rope": (2, 2, 4),
}


def flux() -> nn.Module:
    return _seeded(lambda: diffusers.FluxTransformer2DModel(**_FLUX, pooled_projection_dim=8))


def chroma() -> nn.Module:
    shape = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return _seeded(lambda: diffusers.ChromaTransformer2DModel(**_FLUX, **shape))


def flux2() -> nn.Module:
    return _seeded(
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=16,
            timestep_guidance_channels=8,
            axes_dims_rope=(2, 2, 2, 2),
        )
    )


def sd3() -> nn.Module:
    return _seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
        )
    )


def zimage() -> nn.Module:
    return _seeded(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=24,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=16,
            axes_dims=[4, 2, 2],
            axes_lens=[8, 8, 8],
        )
    )


def wan() -> nn.Module:
    return _seeded(
        lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=8,
            ffn_dim=48,
            num_layers=1,
            rope_max_seq_len=16,
        )
    )


def qwen_image() -> nn.Module:
    return _seeded(
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        )
    )


def _seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()
