"""What files say of where they come from, and files that are no adapters."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusekrona.files.inspect import inspect_file
from tests.pipelines import tiny_sd_pipeline

ROOT = Path(__file__).parents[2] / "models" / "emoji-sdxl"
LORA = {"lora_up.weight": torch.ones(4, 2), "lora_down.weight": torch.ones(2, 4)}


def inspected(folder: Path, layers: list[str], metadata: dict[str, str] | None = None):
    tensors = {f"{layer}.{part}": tensor.clone() for layer in layers for part, tensor in LORA.items()}
    save_file(tensors, folder / "a.safetensors", metadata)
    return inspect_file(folder / "a.safetensors")


@pytest.mark.parametrize(
    ("part", "what", "made_for"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "a denoiser's weights", "a UNet"),
        ("vae/diffusion_pytorch_model.safetensors", "an autoencoder", None),
        ("text_encoder/model.safetensors", "a text encoder", None),
    ],
)
def test_files_that_are_no_adapters_are_told(part, what, made_for):
    found = inspect_file(ROOT / part)
    assert (found.kind, found.made_for, found.unused, found.becomes) == ("none", made_for, [], [])
    assert found.naming.startswith(what)


def test_embeddings_and_files_of_no_known_kind_are_told(tmp_path):
    save_file({"emb_params": torch.ones(2, 4)}, tmp_path / "words.safetensors")
    assert "new words" in inspect_file(tmp_path / "words.safetensors").naming
    save_file({"weather": torch.ones(2, 4)}, tmp_path / "other.safetensors")
    found = inspect_file(tmp_path / "other.safetensors")
    assert found.naming.startswith("tensors of no kind that is known")
    assert "weather" in found.unused[0]


@pytest.mark.parametrize(
    ("metadata", "program"),
    [
        ({"software": '{"name": "ai-toolkit", "version": "0.7"}'}, "ai-toolkit 0.7"),
        ({"ot_revision": "1234"}, "OneTrainer"),
        ({"ss_network_module": "lycoris.kohya"}, "LyCORIS"),
        ({"ss_network_module": "networks.lora_wan"}, "musubi-tuner"),
        ({"ss_network_module": "networks.lora"}, "kohya's sd-scripts or a program of their kind"),
        ({"lora_adapter_metadata": '{"peft_version": "0.21.2", "r": 2, "lora_alpha": 2}'}, "PEFT 0.21.2"),
        ({"software": "no json"}, None),
        ({}, None),
    ],
)
def test_the_header_tells_the_program(metadata, program, tmp_path):
    assert inspected(tmp_path, ["x"], metadata).made_by == program


@pytest.mark.parametrize(
    ("layer", "naming", "made_for"),
    [
        ("lora_unet_single_blocks_0_modulation_lin", "kohya's names", "FLUX.1"),
        ("diffusion_model.double_stream_modulation_img.lin", "ComfyUI's names, which ai-toolkit", "FLUX.2"),
        ("lycoris_layers_0_adaLN_modulation_0", "LyCORIS' names", "Z-Image"),
        ("transformer.transformer_blocks.0.txt_mlp.net.2", "Diffusers' names", "Qwen-Image"),
        ("diffusion_model.distilled_guidance_layer.layers.0.in_layer", "ComfyUI's names", "Chroma"),
        ("lora_transformer_single_transformer_blocks_0_proj_mlp", "OneTrainer's names", "a transformer of FLUX' kind"),
        ("model.layers.0.self_attn.q_proj", "the model's own names", None),
    ],
)
def test_the_names_tell_the_model_and_whose_they_are(layer, naming, made_for, tmp_path):
    """`self_attn` is not CLIP, and `double_blocks` not only FLUX.1."""
    found = inspected(tmp_path, [layer])
    assert found.naming.startswith(naming)
    assert found.made_for == made_for


def test_a_part_that_cannot_be_used_is_named_beside_the_rest(tmp_path):
    save_file(
        {**{f"x.{part}": t for part, t in LORA.items()}, "y.diff": torch.full((2, 2), torch.nan), "z": torch.ones(1)},
        tmp_path / "a.safetensors",
    )
    found = inspect_file(tmp_path / "a.safetensors")
    assert [layer.name for layer in found.layers] == ["x"]
    assert len(found.unused) == 2
    assert all(any(name in reason for reason in found.unused) for name in ("layer y", "z"))


def test_a_checkpoint_in_one_file_is_told(tmp_path):
    names = tiny_sd_pipeline().unet.state_dict()
    save_file({f"model.diffusion_model.{n}": t.contiguous() for n, t in names.items()}, tmp_path / "a.safetensors")
    assert inspect_file(tmp_path / "a.safetensors").naming.startswith("a whole checkpoint")
