"""merge_into_files: folders and single files against merging in memory, and nothing left behind where it fails."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffusekrona import KronAConfig, inject_krona, merge_file, save_krona, unload_krona
from diffusekrona.bases.architectures import build_pipeline
from diffusekrona.bases.loading import BaseModelError
from diffusekrona.errors import AdapterFileError, MergeError
from diffusekrona.files.layouts.unet import original_names
from diffusekrona.files.merge_base import checkpoint_layers, folder_components, merge_into_files
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline


def saved_adapter(pipe: Any, path: Path, **fields: Any) -> Path:
    inject_krona(pipe, KronAConfig(**{"a1": 4, "a2": 8, "init_b": "normal", **fields}), text_encoders=True)
    file = save_krona(pipe, path)
    unload_krona(pipe)
    return file


@pytest.fixture(params=[tiny_sd_pipeline, tiny_sdxl_pipeline])
def pipe(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", [{}, {"num_terms": 2}])
def test_a_folder_gets_the_weights_that_merging_in_memory_gives_and_all_else_stays(tmp_path, pipe, dtype, form):
    pipe.to(dtype)
    adapter = saved_adapter(pipe, tmp_path / "adapter.safetensors", **form)
    pipe.save_pretrained(tmp_path / "base")
    layers = merge_into_files(tmp_path / "base", adapter, tmp_path / "merged", weight=0.8)
    assert layers == merge_file(pipe, adapter, weight=0.8)
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged", dtype=dtype)
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            found = getattr(merged, part).state_dict()
            assert all(torch.equal(tensor, found[name]) for name, tensor in module.state_dict().items()), part
    files = sorted(path.relative_to(tmp_path / "base") for path in (tmp_path / "base").rglob("*"))
    assert files == sorted(path.relative_to(tmp_path / "merged") for path in (tmp_path / "merged").rglob("*"))
    for file in files:
        if "unet" not in file.parts and "text_encoder" not in str(file) and (tmp_path / "base" / file).is_file():
            assert (tmp_path / "base" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_folder_merged_from_a_half_precision_base_loads_without_a_dtype_and_draws(tmp_path, pipe, dtype):
    pipe.to(dtype)
    adapter = saved_adapter(pipe, tmp_path / "adapter.safetensors")
    pipe.save_pretrained(tmp_path / "base")
    merge_into_files(tmp_path / "base", adapter, tmp_path / "merged")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    modules = [part for part in merged.components.values() if isinstance(part, nn.Module)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
    assert merged("a toy", num_inference_steps=1).images[0].size == (32, 32)
    again = DiffusionPipeline.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert again.unet.dtype == again.text_encoder.dtype == dtype


def test_a_folder_gets_the_biases_that_merging_in_memory_gives(tmp_path, pipe):
    encoder = pipe.text_encoder
    layers = {
        "unet.mid_block.attentions.0.proj_in.diff": torch.randn_like(pipe.unet.mid_block.attentions[0].proj_in.weight),
        "unet.mid_block.attentions.0.proj_in.diff_b": torch.randn(128),
        "unet.mid_block.attentions.0.transformer_blocks.0.norm1.w_norm": torch.randn(128),
        "unet.mid_block.attentions.0.transformer_blocks.0.norm1.b_norm": torch.randn(128),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.diff_b": torch.randn(128),
    }
    save_file(layers, tmp_path / "diffs.safetensors")
    pipe.save_pretrained(tmp_path / "base")
    assert merge_into_files(tmp_path / "base", tmp_path / "diffs.safetensors", tmp_path / "merged", 0.5) == 3
    before = encoder.state_dict()["encoder.layers.0.mlp.fc1.bias"].clone()
    assert merge_file(pipe, tmp_path / "diffs.safetensors", 0.5) == 3
    assert not torch.equal(encoder.state_dict()["encoder.layers.0.mlp.fc1.bias"], before)
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    for part in ("unet", "text_encoder"):
        found = getattr(merged, part).state_dict()
        assert all(torch.equal(t, found[name]) for name, t in getattr(pipe, part).state_dict().items())
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{attention}.diff_b": torch.ones(128)}, tmp_path / "diffs.safetensors")
    with pytest.raises(BaseModelError, match=r"no safetensors weight or bias for 1 layers .*attn1\.to_q"):
        merge_into_files(tmp_path / "base", tmp_path / "diffs.safetensors", tmp_path / "again")
    with pytest.raises(AdapterFileError, match=r"attn1\.to_q is a Linear without a bias"):
        merge_file(pipe, tmp_path / "diffs.safetensors")


def test_weights_in_several_shards_are_all_merged(tmp_path, pipe):
    adapter = saved_adapter(pipe, tmp_path / "adapter.safetensors")
    pipe.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    assert len(list((tmp_path / "base" / "unet").glob("*.safetensors"))) > 1
    merge_into_files(tmp_path / "base", adapter, tmp_path / "merged")
    merge_file(pipe, adapter)
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged").unet.state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in pipe.unet.state_dict().items())


def test_folder_components_are_the_models_without_weights(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "base")
    components = folder_components(tmp_path / "base")
    assert components.keys() == {p for p in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, p)}
    for part, model in components.items():
        assert {p.device.type for p in model.parameters()} == {"meta"}
        shapes = {name: p.shape for name, p in getattr(pipe, part).named_parameters()}
        assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_a_component_that_a_pipeline_goes_without_is_passed_over(tmp_path):
    pipe = tiny_sdxl_pipeline()
    pipe.text_encoder = pipe.tokenizer = None
    pipe.save_pretrained(tmp_path / "base")
    assert folder_components(tmp_path / "base").keys() == {"unet", "text_encoder_2"}


# Single files

UNET = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
SDXL = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
SDXL_2 = "conditioner.embedders.1.model.transformer.resblocks.0"
SD15 = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
TALL = {"mlp.c_fc": (5120, 1280), "mlp.c_proj": (1280, 5120)}
WIDE = {"sdxl": {"unet": 640, "text_encoder": 768, "text_encoder_2": 1280}, "sd15": {"unet": 640, "text_encoder": 768}}
# Key in the checkpoint → its layers, in the order of its rows; one of them is not adapted.
FILES = {
    "sdxl": {
        UNET: [("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")],
        SDXL: [("text_encoder", "encoder.layers.0.self_attn.q_proj")],
        f"{SDXL_2}.attn.in_proj_weight": [
            ("text_encoder_2", "encoder.layers.0.self_attn.q_proj"),
            None,
            ("text_encoder_2", "encoder.layers.0.self_attn.v_proj"),
        ],
        f"{SDXL_2}.attn.out_proj.weight": [("text_encoder_2", "encoder.layers.0.self_attn.out_proj")],
        f"{SDXL_2}.mlp.c_fc.weight": [("text_encoder_2", "encoder.layers.0.mlp.fc1")],
        f"{SDXL_2}.mlp.c_proj.weight": [("text_encoder_2", "encoder.layers.0.mlp.fc2")],
        "first_stage_model.decoder.conv_in.weight": [None],
    },
    "sd15": {
        UNET: [("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")],
        SD15: [("text_encoder", "encoder.layers.0.self_attn.q_proj")],
        "model.diffusion_model.input_blocks.0.0.weight": [None],
    },
}


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_a_single_file_gets_the_updates_at_its_own_names_and_nothing_else_changes(tmp_path, name):
    torch.manual_seed(0)
    base, expected, factors = {}, {}, {}
    for key, places in FILES[name].items():
        width = next((WIDE[name][place[0]] for place in places if place), 1280 if SDXL_2 in key else 8)
        d, h = next((size for part, size in TALL.items() if part in key), (width, width))
        base[key] = torch.randn(d * len(places), h).mul_(0.02).half()
        expected[key] = base[key].clone()
        for rows, place in zip(expected[key].split(d), places, strict=True):
            if place is not None:
                A, B = torch.randn(4, 8) * 0.1, torch.randn(d // 4, h // 8) * 0.1
                factors |= {f"{'.'.join(place)}.lokr_w1": A, f"{'.'.join(place)}.lokr_w2": B}
                rows.copy_((rows.float() + 0.5 * torch.kron(A, B)).half())
    save_file(base, tmp_path / "base.safetensors", {"format": "pt"})
    list_tensors_backwards(tmp_path / "base.safetensors")
    save_file(factors, tmp_path / "lokr.safetensors")
    output = tmp_path / "new" / "merged.safetensors"
    paths = tmp_path / "base.safetensors", tmp_path / "lokr.safetensors"
    assert merge_into_files(*paths, output, 0.5) == len(factors) // 2
    merged = load_file(output)
    assert merged.keys() == base.keys()
    for key, tensor in expected.items():
        assert torch.equal(merged[key], tensor), key
        assert torch.equal(base[key], tensor) == (FILES[name][key] == [None])
    with safe_open(output, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    before = leftovers(tmp_path)
    with pytest.raises(MergeError, match="Nothing was written"):
        merge_into_files(*paths, tmp_path / "again.safetensors", 1e9)
    del base[UNET]
    save_file(base, paths[0])
    with pytest.raises(BaseModelError, match="no weight for 1 layers"):
        merge_into_files(*paths, tmp_path / "again.safetensors")
    assert leftovers(tmp_path) == before


# Key in the checkpoint → the size of each of its layers' biases, and the layers; one of them is not changed.
BIASES = {
    "sdxl": {
        "model.diffusion_model.input_blocks.4.1.proj_in.bias": (640, [("unet", "down_blocks.1.attentions.0.proj_in")]),
        f"{SDXL_2}.attn.in_proj_bias": (
            1280,
            [
                ("text_encoder_2", "encoder.layers.0.self_attn.q_proj"),
                None,
                ("text_encoder_2", "encoder.layers.0.self_attn.v_proj"),
            ],
        ),
        f"{SDXL_2}.mlp.c_fc.bias": (5120, [("text_encoder_2", "encoder.layers.0.mlp.fc1")]),
        SDXL.replace("weight", "bias"): (768, [("text_encoder", "encoder.layers.0.self_attn.q_proj")]),
    },
    "sd15": {
        "model.diffusion_model.input_blocks.4.1.norm.bias": (640, [("unet", "down_blocks.1.attentions.0.norm")]),
        SD15.replace("weight", "bias"): (768, [("text_encoder", "encoder.layers.0.self_attn.q_proj")]),
        "model.diffusion_model.out.2.bias": (4, [None]),
    },
}
TELLS = {"sdxl": "conditioner.embedders.1.model.x", "sd15": SD15}


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_a_single_file_gets_the_biases_at_its_own_names(tmp_path, name):
    base, expected, diffs = {TELLS[name]: torch.zeros(1)}, {}, {}
    for key, (size, places) in BIASES[name].items():
        base[key] = torch.randn(size * len(places)).half()
        expected[key] = base[key].clone()
        for rows, place in zip(expected[key].split(size), places, strict=True):
            if place is not None:
                ending = "b_norm" if place[1].endswith("norm") else "diff_b"
                diff = diffs[f"{'.'.join(place)}.{ending}"] = torch.randn(size)
                rows.copy_((rows.float() + 0.5 * diff).half())
    paths = tmp_path / "base.safetensors", tmp_path / "diffs.safetensors", tmp_path / "merged.safetensors"
    save_file(base, paths[0])
    save_file(diffs, paths[1])
    assert merge_into_files(*paths, 0.5) == len(diffs)
    merged = load_file(paths[2])
    for key, tensor in expected.items():
        assert torch.equal(merged[key], tensor), key
        assert torch.equal(base[key], tensor) == (BIASES[name][key][1] == [None])
    # An attention's projection to queries has no bias.
    save_file({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.diff_b": torch.ones(640)}, paths[1])
    with pytest.raises(BaseModelError, match="no weight for 1 layers"):
        merge_into_files(*paths[:2], tmp_path / "again.safetensors")


def list_tensors_backwards(path: Path) -> None:
    """A safetensors file may list its tensors in another order than it holds them."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = json.dumps(dict(reversed(json.loads(data[8 : 8 + size]).items()))).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_names_in_single_files_are_those_that_diffusers_converts(name):
    components = build_pipeline(name)
    unet = components["unet"]
    layers = [name for name, module in unet.named_modules() if hasattr(module, "weight")]
    names = {own: name for name, own in original_names(unet, layers).items()}
    marked = {f"model.diffusion_model.{own}.weight": torch.tensor(float(i)) for i, own in enumerate(names)}
    marked |= {key.replace(".weight", ".bias"): value for key, value in marked.items()}
    converted = convert_ldm_unet_checkpoint(dict(marked), dict(unet.config))
    for own, n in names.items():
        assert converted[f"{n}.weight"] == marked[f"model.diffusion_model.{own}.weight"]
    if name == "sdxl":
        prefix = "conditioner.embedders.0.transformer."
        encoder = components["text_encoder"]
        key = f"{prefix}text_model.encoder.layers.1.self_attn.q_proj.weight"
        found = convert_ldm_clip_checkpoint({key: torch.ones(1)}, remove_prefix=prefix)
        _, layers = checkpoint_layers(["conditioner.embedders.1.model.x", key], Path("base"))
        assert [spot.place[1] for spot in layers[key]] == [
            n for n, _ in encoder.named_modules() if next(iter(found)).endswith(f"{n}.weight") and n.count(".") > 3
        ]


# Faults


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_failures_leave_nothing_behind(tmp_path, pipe):
    adapter = saved_adapter(pipe, tmp_path / "adapter.safetensors")
    pipe.save_pretrained(tmp_path / "base")
    before = leftovers(tmp_path)
    with pytest.raises(MergeError, match="infinity or a NaN"):
        merge_into_files(tmp_path / "base", adapter, tmp_path / "merged", weight=1e39)
    with (
        mock.patch("diffusekrona.files.merge_base.shutil.copy2", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="No space"),
    ):
        merge_into_files(tmp_path / "base", adapter, tmp_path / "merged")
    assert leftovers(tmp_path) == before


def test_an_output_that_exists_is_not_touched(tmp_path, pipe):
    adapter = saved_adapter(pipe, tmp_path / "adapter.safetensors")
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "merged").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        merge_into_files(tmp_path / "base", adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_a_base_that_is_none_says_so(tmp_path, pipe):
    adapter = saved_adapter(pipe, tmp_path / "adapter.safetensors")
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(BaseModelError, match="not a pipeline's folder"):
        merge_into_files(tmp_path / "empty", adapter, tmp_path / "out")
    with pytest.raises(BaseModelError, match="from_single_file"):
        merge_into_files(tmp_path / "x.safetensors", adapter, tmp_path / "out.safetensors")
    with pytest.raises(AdapterFileError, match="not a file"):
        merge_into_files(tmp_path / "nothing.safetensors", adapter, tmp_path / "out.safetensors")


def test_weights_that_are_pickles_or_missing_are_an_error(tmp_path, pipe):
    adapter = saved_adapter(pipe, tmp_path / "adapter.safetensors")
    pipe.save_pretrained(tmp_path / "base")
    for path in (tmp_path / "base" / "unet").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(BaseModelError, match="no safetensors weight"):
        merge_into_files(tmp_path / "base", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_quantized_checkpoint_is_refused(tmp_path, pipe):
    adapter = saved_adapter(pipe, tmp_path / "adapter.safetensors")
    pipe.save_pretrained(tmp_path / "base")
    (file,) = (tmp_path / "base" / "unet").glob("*.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(MergeError, match="float8"):
        merge_into_files(tmp_path / "base", adapter, tmp_path / "merged")


def test_a_broken_index_is_no_pipeline(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    values = json.loads(index.read_text())
    others = [{**values, "unet": unet} for unet in (["diffusers", "NoSuchModel"], ["diffusers"])]
    for broken in ("{", "[]", *map(json.dumps, others)):
        index.write_text(broken)
        with pytest.raises(BaseModelError):
            folder_components(tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "unet")
    index.write_text(json.dumps(values))
    with pytest.raises(BaseModelError):
        folder_components(tmp_path / "base")
