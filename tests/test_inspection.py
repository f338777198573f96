"""inspect_file: ranks and norms against the dense update, for files of every method."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from diffusekrona import KronAConfig, inject_krona, save_krona
from diffusekrona.errors import AdapterFileError
from diffusekrona.formats import foreign
from diffusekrona.injected import krona_layers
from diffusekrona.inspection import inspect_file
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
            "lora_up.weight": torch.randn(12, 3), "lora_down.weight": torch.randn(3, 8), "alpha": torch.tensor(1.5)
        },
        "loha": lambda: {
            f"hada_w{i}_{part}": torch.randn(size) for i in (1, 2) for part, size in (("a", (12, 2)), ("b", (2, 8)))
        },
        "full": lambda: {"diff": torch.randn(6, 5)},
    }[kind]()  # fmt: skip


@pytest.mark.parametrize("kind", ["lokr", "lokr rank", "lokr conv", "lora", "loha", "full"])
def test_rank_norm_and_size_are_those_of_the_dense_update(tmp_path, kind):
    tensors = {f"lora_unet_x.{part}": t.contiguous() for part, t in factors(kind).items()}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_steps": "10"})
    found = inspect_file(tmp_path / "a.safetensors")
    (layer,) = found.layers
    delta = foreign.parse(tensors)["lora_unet_x"].delta().flatten(1).double()
    assert layer.size == tuple(delta.shape)
    assert layer.rank == int(torch.linalg.matrix_rank(delta, rtol=1e-5))
    assert layer.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert found.kind == kind.split()[0] == layer.kind
    assert found.parameters == layer.parameters == sum(t.numel() for key, t in tensors.items() if "alpha" not in key)
    assert found.metadata == {"ss_steps": "10"}
    assert ("exactly (diffusekrona convert)" in found.becomes[0]) == (found.kind == "lokr")


@pytest.mark.parametrize("form", [{}, {"num_terms": 2}, {"b_rank": 1}, {"layout": "transposed"}])
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
            assert layer.rank >= rank if "num_terms" in form else layer.rank == rank
        assert found.norm == pytest.approx(sum(layer.norm**2 for layer in found.layers) ** 0.5)
        assert str(len(layers)) in found.table().columns[0]._cells or len(found.table().columns[0]._cells) > 1
        assert len(found.table(every_layer=True).columns[0]._cells) == len(layers)


def test_dora_can_only_be_merged(tmp_path):
    unet = tiny_sd_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False))
    unet.save_lora_adapter(tmp_path / "lora")
    found = inspect_file(tmp_path / "lora")
    assert found.kind == "lora"
    assert [become.partition(",")[0] for become in found.becomes] == ["merged weights"]


def test_what_is_no_adapter_is_an_error(tmp_path):
    save_file({"model.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="cannot be read here"):
        inspect_file(tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError):
        inspect_file(tmp_path / "nothing")
