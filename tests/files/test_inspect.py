"""inspect_file: ranks and norms against the dense update, for files of every method."""

import json
from io import StringIO

import pytest
import torch
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import save_file

from diffusekrona import KronAConfig, inject_krona, save_krona
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.convert import convert
from diffusekrona.files.formats import foreign
from diffusekrona.files.inspect import inspect_file
from diffusekrona.tuner.injected import krona_layers
from tests.pipelines import tiny_sd_pipeline


def factors(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "lokr": lambda: {"lokr_w1": torch.randn(4, 8), "lokr_w2": torch.randn(5, 3), "alpha": torch.tensor(3.0)},
        "lokr rank": lambda: {
            "lokr_w1": torch.randn(4, 8), "lokr_w2_a": torch.randn(5, 2), "lokr_w2_b": torch.randn(2, 6),
            "alpha": torch.tensor(1.0),
        },
        "lokr conv": lambda: {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(4, 3, 3, 3)},
        "lora": lambda: {
            "lora_up.weight": torch.randn(12, 3) * torch.tensor([1.0, 1.0, 0.0]),
            "lora_down.weight": torch.randn(3, 8), "alpha": torch.tensor(-1.5),
        },
        "loha": lambda: {
            f"hada_w{i}_{part}": torch.randn(size) for i in (1, 2) for part, size in (("a", (12, 2)), ("b", (2, 8)))
        },
        "full": lambda: {"diff": torch.randn(6, 5)},
    }[kind]()  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("lokr", "4 × 8 ⊗ 5 × 3"),
        ("lokr rank", "4 × 8 ⊗ 5 × 6"),
        ("lokr conv", "2 × 2 ⊗ 4 × 27"),
        ("lora", "rank 3"),
        ("loha", "rank 2 ∘ 2"),
        ("full", "whole"),
    ],
)
def test_rank_norm_and_size_are_those_of_the_dense_update(tmp_path, kind, shapes):
    tensors = {f"lora_unet_x.{part}": t.contiguous() for part, t in factors(kind).items()}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_steps": "10"})
    found = inspect_file(tmp_path / "a.safetensors")
    (layer,) = found.layers
    delta = foreign.parse(tensors)["lora_unet_x"].delta().flatten(1).double()
    assert layer.size == tuple(delta.shape)
    assert layer.shapes == shapes
    assert layer.rank == int(torch.linalg.matrix_rank(delta, rtol=1e-5))
    assert layer.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert found.kind == kind.split()[0] == layer.kind
    assert found.parameters == layer.parameters == sum(t.numel() for key, t in tensors.items() if "alpha" not in key)
    assert found.metadata == {"ss_steps": "10"}
    assert ("exactly (load_krona" in found.becomes[0]) == (found.kind == "lokr")


@pytest.mark.parametrize("form", [{}, {"num_terms": 3}, {"b_rank": 1}, {"layout": "transposed"}])
def test_our_own_files_are_read_with_their_scales(tmp_path, form):
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, KronAConfig(a1=4, a2=8, alpha=-0.5, alpha_pattern={"to_q": 3.0}, init_b="normal", **form))
    layers = krona_layers(pipe.unet)
    for path in ("folder", "file.safetensors"):
        found = inspect_file(save_krona(pipe, tmp_path / path))
        assert len(found.layers) == len(layers)
        for layer in found.layers:
            delta = layers[layer.name.removeprefix("unet.")].get_delta_weight("default").detach().double()
            assert layer.norm == pytest.approx(float(delta.norm()), rel=1e-5)
            rank = int(torch.linalg.matrix_rank(delta, rtol=1e-5))
            assert rank <= layer.rank <= min(layer.size) if "num_terms" in form else layer.rank == rank
            assert layer.shapes.startswith("3 terms 4 × 8 ⊗ " if "num_terms" in form else "4 × 8 ⊗ ")
        assert found.norm == pytest.approx(sum(layer.norm**2 for layer in found.layers) ** 0.5)
        assert str(len(layers)) in found.table().columns[0]._cells or len(found.table().columns[0]._cells) > 1
        assert len(found.table(every_layer=True).columns[0]._cells) == len(layers)


def test_the_table_sums_up_layers_that_are_alike_and_spans_their_ranks_and_norms(tmp_path):
    """One LoKr layer in three is of rank 1, and their norms come out of order."""
    tensors = {"lora_unet_full[/].diff": torch.eye(12), "lora_unet_tall.lokr_w1": torch.ones(6, 1)}
    tensors["lora_unet_tall.lokr_w2"] = torch.ones(2, 12)
    for name, factor in {"a": 2 * torch.eye(3, 2), "b": torch.ones(3, 2) / 3**0.5, "c": 3 * torch.eye(3, 2)}.items():
        tensors |= {f"lora_unet_{name}.lokr_w1": factor, f"lora_unet_{name}.lokr_w2": torch.eye(4, 6)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = inspect_file(tmp_path / "x.safetensors")
    assert found.kind == "mixed"
    assert found.becomes[0] == "KronA, LoKr: exactly (load_krona, diffusekrona convert), 4 of 5 layers"
    assert found.becomes[1].startswith("KronA, LoKr: the nearest")
    assert found.norm == pytest.approx((12 + 144 + 2 * 4 * (4 + 1 + 9)) ** 0.5)
    rows = {row[3]: row for row in zip(*(column._cells for column in found.table().columns), strict=True)}
    assert rows == {
        "3 × 2 ⊗ 4 × 6": ("3", "LoKr", "12 × 12", "3 × 2 ⊗ 4 × 6", "90", "4–8", "2.83–8.49"),
        "6 × 1 ⊗ 2 × 12": ("1", "LoKr", "12 × 12", "6 × 1 ⊗ 2 × 12", "30", "1", "12"),
        "whole": ("1", "whole updates", "12 × 12", "whole", "144", "12", "3.46"),
    }
    text = StringIO()
    Console(file=text, width=200).print(found.table(every_layer=True))
    assert all(f"lora_unet_{name} " in text.getvalue() for name in ("full[/]", "tall", "a", "b", "c"))


@pytest.mark.parametrize("form", [{}, {"num_terms": 2}, {"b_rank": 1}, {"layout": "transposed"}])
def test_what_is_said_to_become_lokr_exactly_does(tmp_path, form):
    pipe = tiny_sd_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    inject_krona(pipe, KronAConfig(a1=4, a2=8, init_b="normal", **form))
    file = save_krona(pipe, tmp_path / "a.safetensors")
    exactly, *others = inspect_file(file).becomes
    assert exactly.startswith("KronA")
    assert "exactly" in exactly
    assert others[-1].startswith("merged weights")
    if "LoKr" in exactly:
        assert convert(file, tmp_path / "b.safetensors", "lokr", tmp_path / "base").layers == len(
            krona_layers(pipe.unet)
        )
    else:
        with pytest.raises(AdapterFileError):
            convert(file, tmp_path / "b.safetensors", "lokr", tmp_path / "base")
        assert others[0].startswith("KronA, LoKr: the nearest")


def test_the_files_of_a_pipelines_folder_are_one_adapter(tmp_path):
    for part in ("unet", "text_encoder"):
        (tmp_path / part).mkdir()
        save_file({"x.diff": torch.eye(3)}, tmp_path / part / "adapter_model.safetensors", {part: "here"})
    found = inspect_file(tmp_path)
    assert {layer.name for layer in found.layers} == {"unet.x", "text_encoder.x"}
    assert found.metadata == {"unet": "here", "text_encoder": "here"}
    assert found.kind == "full"


def test_dora_can_only_be_merged(tmp_path):
    unet = tiny_sd_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False))
    unet.save_lora_adapter(tmp_path / "lora")
    found = inspect_file(tmp_path / "lora")
    assert found.kind == "lora"
    assert [become.partition(",")[0] for become in found.becomes] == ["merged weights"]


def test_an_adapter_with_whole_modules_becomes_nothing_else(tmp_path):
    unet = tiny_sd_pipeline().unet
    inject_krona(unet, KronAConfig(a1=4, a2=8, modules_to_save=["conv_out"]))
    assert inspect_file(save_krona(unet, tmp_path / "a.safetensors")).becomes == ["KronA: exactly (load_krona)"]


@pytest.mark.parametrize("factors", [["A"], ["A", "B1"]])
def test_one_of_our_files_without_a_factor_is_an_error(tmp_path, factors):
    config = KronAConfig(a1=2, a2=2, target_modules=["x"]).to_dict()
    header = {"krona": json.dumps({"version": 1, "components": {"": config}})}
    save_file({f"x.krona_{key}": torch.ones(2, 2) for key in factors}, tmp_path / "x.safetensors", header)
    with pytest.raises(AdapterFileError, match="has not all factors of the layer x"):
        inspect_file(tmp_path / "x.safetensors")


def test_what_is_no_adapter_is_said_so_and_what_holds_nothing_is_an_error(tmp_path):
    save_file({"model.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    found = inspect_file(tmp_path / "x.safetensors")
    assert (found.kind, found.layers, found.becomes) == ("none", [], [])
    assert "cannot be read here" in found.unused[0]
    with pytest.raises(AdapterFileError):
        inspect_file(tmp_path / "nothing")
    header = json.dumps({"version": 1, "components": {"": KronAConfig(target_modules=["x"]).to_dict()}})
    save_file({}, tmp_path / "empty.safetensors", {"krona": header})
    with pytest.raises(AdapterFileError, match="holds no factors"):
        inspect_file(tmp_path / "empty.safetensors")
