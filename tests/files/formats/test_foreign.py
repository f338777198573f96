"""Other programs' files as a whole: which methods they hold, and what makes them unreadable."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.scales import HEADER
from diffusekrona.files.read import opened

ONE = torch.ones(2, 2)
FILES: dict[str, dict[str, Tensor]] = {
    "lokr": {"a.lokr_w1": ONE, "a.lokr_w2": ONE, "a.alpha": torch.tensor(1.0)},
    "lora": {"b.lora_up.weight": ONE, "b.lora_down.weight": ONE, "c.lora_A.weight": ONE, "c.lora_B.weight": ONE},
    "loha": {f"d.hada_{part}": ONE for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "full": {"e.diff": ONE},
    "reference": {"f.processor.to_q_lora.down.weight": torch.ones(4, 2), "f.processor.to_q_lora.up.weight": ONE},
}


@pytest.mark.parametrize(("kind", "tensors"), FILES.items())
def test_a_method_is_told_by_its_tensors(kind: str, tensors: dict[str, Tensor]) -> None:
    assert {update.kind for update in foreign.parse(tensors).values()} == {kind}


def test_a_file_may_mix_methods_from_layer_to_layer() -> None:
    tensors = {key: tensor for file in FILES.values() for key, tensor in file.items()}
    assert {name: update.kind for name, update in foreign.parse(tensors).items()} == {
        "a": "lokr",
        "b": "lora",
        "c": "lora",
        "d": "loha",
        "e": "full",
        "f.processor.to_q": "reference",
    }


def test_a_layer_of_two_methods_is_refused() -> None:
    with pytest.raises(AdapterFileError, match=r"the layer x holds only .*several methods at once \(full, lokr\)"):
        foreign.parse({"x.diff": ONE, "x.lokr_w1": ONE, "x.lokr_w2": ONE})


@pytest.mark.parametrize("part", ["alpha", "dora_scale"])
def test_an_alpha_alone_is_no_update(part: str) -> None:
    with pytest.raises(AdapterFileError, match=f"the layer x holds only {part}, which is no update by itself"):
        foreign.parse({f"x.{part}": torch.ones(1), "y.diff": ONE})


def test_two_tensors_for_one_part_are_refused() -> None:
    with pytest.raises(AdapterFileError, match=r"x\.lora_A\.weight is the second tensor for down of its layer"):
        foreign.parse({"x.lora_down.weight": ONE, "x.lora_A.weight": ONE, "x.lora_up.weight": ONE})


def test_factors_that_are_no_matrices_are_refused_under_the_names_of_older_diffusers() -> None:
    with pytest.raises(AdapterFileError, match=r"the layer x holds up of shape 2, where"):
        foreign.parse({"x_lora.up.weight": torch.ones(2), "x_lora.down.weight": torch.ones(2)})


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(AdapterFileError, match="dog holds no tensors"):
        foreign.parse({}, source="dog")


def test_a_few_of_the_unknown_tensors_are_named() -> None:
    unknown = {f"x.oft_block_{i}": ONE for i in range(5)}
    with pytest.raises(
        AdapterFileError, match=r"dog holds tensors .* 5 of 6: x\.oft_block_0, x\.oft_block_1, .*_2, …\."
    ):
        foreign.parse(unknown | {"y.diff": ONE}, source="dog")


@pytest.mark.parametrize("key", ["x.krona_A", "x.bias", "lokr_w1", "x.weight", ""])
def test_what_this_cannot_express_is_not_passed_over(key: str) -> None:
    with pytest.raises(AdapterFileError, match="of a kind that cannot be read here, 1 of 2"):
        foreign.parse({key: ONE, "y.diff": ONE})


def test_a_bias_of_factors_is_nothing_without_them() -> None:
    with pytest.raises(AdapterFileError, match="the layer x lacks up: it has only up_bias"):
        foreign.parse({"x.lora_B.bias": torch.ones(2), "y.diff": ONE})


def test_a_file_is_read_with_its_name_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    save_file({key: tensor.clone() for key, tensor in FILES["lokr"].items()}, path)
    assert list(foreign.read(opened(path)[""])) == ["a"]
    save_file({"a.lokr_w1": ONE}, path)
    with pytest.raises(AdapterFileError, match=r"dog\.safetensors: the layer a lacks w2_a"):
        foreign.read(opened(path)[""])
    path.write_bytes(b"no tensors")
    with pytest.raises(AdapterFileError, match=r"dog\.safetensors is not a complete safetensors file"):
        foreign.read(opened(path)[""])


def test_a_config_beside_counts_only_for_pefts_own_file_name(tmp_path: Path) -> None:
    config = {"r": 4, "alpha": 1, "peft_type": "LOKR"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"a.lokr_w1": ONE, "a.lokr_w2": ONE.clone()}
    for name, scale in (("adapter_model.safetensors", 0.25), ("other.safetensors", 1.0)):
        save_file(tensors, tmp_path / name)
        assert torch.equal(foreign.read(opened(tmp_path / name)[""])["a"].delta(), torch.full((4, 4), scale))
    save_file(tensors, tmp_path / "adapter_model.safetensors", {HEADER: json.dumps({**config, "alpha": 2})})
    assert torch.equal(
        foreign.read(opened(tmp_path / "adapter_model.safetensors")[""])["a"].delta(), torch.full((4, 4), 0.5)
    )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(b"\xff")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json cannot be read"):
        foreign.read(opened(tmp_path / "adapter_model.safetensors")[""])
