"""What all updates have in common that depend on the weight: errors, and that nothing else is touched."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusekrona import merge_file
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.library import LibraryUpdate
from diffusekrona.files.formats.scales import HEADER
from diffusekrona.files.inspect import inspect_file
from diffusekrona.files.read import opened, read_adapters

IA3 = {"lycoris_0.weight": torch.full((6,), 0.5), "lycoris_0.on_input": torch.tensor(0)}

GLORA = {"a1": (4, 2), "a2": (2, 4), "b1": (6, 2), "b2": (2, 4)}


class Failing(LibraryUpdate):
    library = "a library"

    def computed(self, weight: Tensor) -> Tensor:
        torch.rand(1)
        if weight.shape == (2, 2):
            raise torch.OutOfMemoryError("too large")
        raise RuntimeError("size mismatch,\n got 3")


FAILING = Failing({"oft_blocks": torch.ones(8, 4, 4), "rescale": torch.ones(32, 1)}, kind="oft", where="dog: x")


def test_an_error_of_the_library_is_ours_and_names_the_layer() -> None:
    with pytest.raises(AdapterFileError, match="dog: x is nothing that a library can compute: size mismatch, got 3"):
        FAILING.change(torch.ones(32, 16))
    with pytest.raises(torch.OutOfMemoryError):
        FAILING.change(torch.ones(2, 2))


def test_random_numbers_are_drawn_as_if_nothing_had_happened() -> None:
    before = torch.get_rng_state()
    with pytest.raises(AdapterFileError):
        FAILING.change(torch.ones(32, 16))
    assert torch.equal(torch.get_rng_state(), before)


def test_there_is_no_update_without_the_weight() -> None:
    assert FAILING.shapes == "oft_blocks 8 × 4 × 4, rescale 32 × 1"
    with pytest.raises(AdapterFileError, match=r"dog: x multiplies the base's weight \(oft\), .* merge_file"):
        FAILING.delta()


def test_a_weight_of_half_precision_and_any_strides_gives_a_change_in_fp32() -> None:
    config = {HEADER: json.dumps({"peft_type": "BOFT", "boft_block_size": 4})}
    update = foreign.parse({"x.boft_R": torch.randn(1, 9, 4, 4), "x.boft_s": torch.randn(1, 6)}, config)["x"]
    weight = torch.randn(6, 4, 3, 3).bfloat16().to(memory_format=torch.channels_last)
    before = weight.clone()
    change = update.change(weight)
    assert change.dtype == torch.float32
    assert torch.equal(change, update.change(weight.float().contiguous()))
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.oft_R.weight": torch.ones(2, 1)},
        {"x.oft_blocks": torch.randn(3, 2, 2)},
        {f"x.{part}.weight": torch.randn(*size) for part, size in GLORA.items()},
        {"x.weight": torch.ones(6), "x.on_input": torch.tensor(0)},
    ],
)
def test_the_weight_stays_as_it_is(tensors: dict[str, Tensor]) -> None:
    weight = torch.randn(6, 4)
    before = weight.clone()
    assert foreign.parse(tensors)["x"].change(weight).any()
    assert torch.equal(weight, before)


def test_without_lycoris_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_file(IA3, tmp_path / "dog.safetensors")
    monkeypatch.setitem(sys.modules, "lycoris", None)
    model = nn.Sequential(nn.Linear(4, 6))
    before = model[0].weight.clone()
    with pytest.raises(
        AdapterFileError, match=r"the layer lycoris_0 is of .*: pip install 'diffusekrona\[lycoris\]'\."
    ):
        merge_file(model, tmp_path / "dog.safetensors")
    assert torch.equal(model[0].weight, before)
    assert inspect_file(tmp_path / "dog.safetensors").kind == "ia3"


def test_inspect_says_what_can_be_said(tmp_path: Path) -> None:
    save_file(IA3, tmp_path / "dog.safetensors")
    found = inspect_file(tmp_path / "dog.safetensors")
    (layer,) = found.layers
    assert (layer.kind, layer.size, layer.shapes, layer.parameters, layer.rank) == ("ia3", None, "weight 6", 6, None)
    assert found.becomes == ["merged weights, exactly (diffusekrona merge)"]
    assert found.table().row_count == found.table(every_layer=True).row_count == 1


def test_such_a_file_becomes_no_adapter(tmp_path: Path) -> None:
    save_file(IA3, tmp_path / "dog.safetensors")
    assert list(opened(tmp_path / "dog.safetensors")) == [""]
    with pytest.raises(AdapterFileError, match=r"ia3 updates, which multiply the base's weights"):
        read_adapters(tmp_path / "dog.safetensors", {"": nn.Sequential(nn.Linear(4, 6))})
