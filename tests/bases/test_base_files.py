"""Bases that are single files, variants and other autoencoders, all without the hub."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from diffusekrona.bases.loading import BaseModelError, load_base
from diffusekrona.files.layouts.names import with_text_model
from diffusekrona.files.layouts.unet import original_names
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.snapshots import bits


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_sd_pipeline().save_pretrained(path)
    return path


VAE = (  # Diffusers' names and the original's
    ("conv_norm_out", "norm_out"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
    ("resnets", "block"),
    ("conv_shortcut", "nin_shortcut"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("down_blocks", "down"),
)


def in_original_layout(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """A Stable Diffusion 1.x checkpoint of one file."""
    unet = pipe.unet
    names = original_names(unet, [name for name, module in unet.named_modules() if hasattr(module, "weight")])
    found = {}
    for key, tensor in unet.state_dict().items():
        layer, _, kind = key.rpartition(".")
        found[f"model.diffusion_model.{names[layer]}.{kind}"] = tensor
    blocks = len(pipe.vae.decoder.up_blocks)
    for key, tensor in pipe.vae.state_dict().items():
        name = key
        for own, original in VAE:
            name = name.replace(own, original)
        for block in range(blocks):
            name = name.replace(f"up_blocks.{block}.", f"up.{blocks - 1 - block}.")
        attention = ".attn_1." in name and tensor.ndim == 2
        found[f"first_stage_model.{name}"] = tensor[..., None, None] if attention else tensor
    for key, tensor in pipe.text_encoder.state_dict().items():
        found[f"cond_stage_model.transformer.{with_text_model(key)}"] = tensor
    return {key: tensor.contiguous() for key, tensor in found.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(in_original_layout(tiny_sd_pipeline(seed=1)), path)
    return path


def test_a_single_file_is_loaded_with_the_configurations_of_a_folder(checkpoint: Path, folder: Path) -> None:
    pipe = load_base(checkpoint, torch.float32, configs=folder)
    expected = tiny_sd_pipeline(seed=1)
    assert isinstance(pipe, StableDiffusionPipeline)
    for part in ("unet", "vae", "text_encoder"):
        assert bits(getattr(pipe, part)) == bits(getattr(expected, part)), part
    assert load_base(checkpoint, torch.bfloat16, configs=folder).unet.dtype == torch.bfloat16


def test_a_single_file_without_configurations_says_how_to_get_them(checkpoint: Path) -> None:
    with pytest.raises(BaseModelError, match=r"stable-diffusion-v1-5.*as configs.*from_single_file") as error:
        load_base(checkpoint)
    assert str(checkpoint) in str(error.value)


def test_what_is_no_checkpoint_is_named(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"not a checkpoint that Diffusers knows.*from_single_file"):
        load_base(tmp_path / "model.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"no \.safetensors file.*from_single_file"):
        load_base(tmp_path / "model.ckpt", configs=folder)
    with pytest.raises(BaseModelError, match="not the folder of a pipeline"):
        load_base(checkpoint, configs=tmp_path)
    tiny_sdxl_pipeline().save_pretrained(tmp_path / "sdxl")
    with pytest.raises(BaseModelError, match="cannot be loaded as a StableDiffusionXLPipeline"):
        load_base(checkpoint, configs=tmp_path / "sdxl")


def test_a_folder_of_half_precision_only_is_loaded_without_a_word(tmp_path: Path) -> None:
    pipe = tiny_sd_pipeline().to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    for options in ({}, {"variant": "fp16"}):
        loaded = load_base(tmp_path / "half", **options)
        assert loaded.unet.dtype == loaded.text_encoder.dtype == torch.float32
        assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight.float())
    with pytest.raises(BaseModelError):
        load_base(tmp_path / "half", variant="bf16")


def test_a_variant_is_chosen_where_there_are_several(folder: Path, tmp_path: Path) -> None:
    both = shutil.copytree(folder, tmp_path / "both")
    other = tiny_sd_pipeline(seed=1)
    other.save_pretrained(both, variant="fp16")
    assert torch.equal(load_base(both, variant="fp16").unet.conv_in.weight, other.unet.conv_in.weight)
    assert torch.equal(load_base(both).unet.conv_in.weight, tiny_sd_pipeline().unet.conv_in.weight)


@pytest.mark.parametrize("kind", ["folder", "pipeline"])
def test_another_autoencoder_takes_the_place_of_the_bases(
    kind: str, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = tiny_sd_pipeline(seed=2)
    (other if kind == "pipeline" else other.vae).save_pretrained(tmp_path / "other")
    for pipe in (
        load_base(folder, vae=tmp_path / "other"),
        load_base(checkpoint, configs=folder, vae=tmp_path / "other"),
    ):
        assert bits(pipe.vae) == bits(other.vae)
        assert bits(pipe.unet) != bits(other.unet)
    with pytest.raises(BaseModelError, match="no autoencoder that can be loaded"):
        load_base(folder, vae=tmp_path / "nothing")


def test_options_that_are_not_for_a_base_of_its_kind_are_refused(folder: Path, checkpoint: Path) -> None:
    for base, options in (
        (folder, {"revision": "main"}),
        (folder, {"configs": folder}),
        (checkpoint, {"variant": "fp16"}),
        (checkpoint, {"revision": "main"}),
        ("owner/name", {"configs": folder}),
    ):
        with pytest.raises(BaseModelError, match=f"^{next(iter(options))} is .* leave it out"):
            load_base(base, **options)


def test_a_revision_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(
        "diffusekrona.bases.loading.DiffusionPipeline.from_pretrained",
        lambda name, **options: asked.update(options, name=name),
    )
    load_base("owner/name", revision="v2", variant="fp16")
    assert {key: asked[key] for key in ("name", "revision", "variant")} == {
        "name": "owner/name",
        "revision": "v2",
        "variant": "fp16",
    }
