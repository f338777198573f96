"""Whether a saved adapter fits a model: what the error says."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusekrona import KronAConfig, inject_krona, load_krona, save_krona
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats.krona import SavedAdapter
from diffusekrona.files.read import check_fit
from diffusekrona.tuner.injected import krona_layers
from tests.modules import network
from tests.snapshots import unchanged

Tensors = dict[str, Tensor]


def saved(tensors: Tensors | None = None, **fields: Any) -> SavedAdapter:
    """An adapter of `to_q` in both blocks: A is 2 × 8, B 12 × 3."""
    config = KronAConfig(**{"a1": 2, "a2": 8, "target_modules": ["to_q"], **fields})
    return SavedAdapter(config, fitting() if tensors is None else tensors, Path("dog.safetensors"))


def fitting() -> Tensors:
    sizes = {"A": (2, 8), "B": (12, 3)}
    return {f"blocks.{i}.to_q.krona_{f}": torch.ones(size) for i in range(2) for f, size in sizes.items()}


def problem(adapter: SavedAdapter) -> str:
    model = network()
    with unchanged(model), pytest.raises(AdapterFileError) as raised:
        check_fit(model, adapter)
    assert "dog.safetensors does not fit this Network, which is unchanged:" in str(raised.value)
    return str(raised.value)


def test_an_adapter_that_has_just_the_right_tensors_fits() -> None:
    model = network()
    with unchanged(model):
        check_fit(model, saved())


def test_an_adapter_fits_around_and_beside_other_adapters() -> None:
    model = network()
    inject_adapter_in_model(LoraConfig(target_modules=["to_q", "to_k"]), model, "lora")
    inject_adapter_in_model(KronAConfig(a1=2, a2=8), model, "krona")
    with unchanged(model):
        check_fit(model, saved())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_other_floating_point_dtypes_fit(dtype: torch.dtype) -> None:
    check_fit(network(), saved({key: tensor.to(dtype) for key, tensor in fitting().items()}))


def test_missing_tensors_are_named() -> None:
    tensors = fitting()
    del tensors["blocks.1.to_q.krona_B"]
    assert "\n  1 tensor(s) missing from the file: blocks.1.to_q.krona_B" in problem(saved(tensors))


def test_unknown_tensors_are_named() -> None:
    tensors = {**fitting(), "blocks.2.to_q.krona_A": torch.ones(2, 8), "norm.weight": torch.ones(24)}
    text = problem(saved(tensors))
    assert "\n  2 tensor(s) not in this model: blocks.2.to_q.krona_A, norm.weight" in text
    assert "another architecture" not in text


def test_misshapen_tensors_are_named_with_both_shapes() -> None:
    tensors = {**fitting(), "blocks.0.to_q.krona_A": torch.ones(8, 2)}
    assert "\n  1 tensor(s) misshapen: blocks.0.to_q.krona_A is 8 × 2, not 2 × 8" in problem(saved(tensors))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((2, 8), float("nan")),
        torch.full((2, 8), float("-inf"), dtype=torch.bfloat16),
        torch.full((2, 8), 1e300, dtype=torch.float64),
    ],
)
def test_tensors_without_finite_numbers_are_named(tensor: Tensor) -> None:
    tensors = {**fitting(), "blocks.0.to_q.krona_A": tensor}
    assert "\n  1 tensor(s) without finite values: blocks.0.to_q.krona_A" in problem(saved(tensors))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_factors_that_are_not_floating_point_are_named(dtype: torch.dtype) -> None:
    tensors = {**fitting(), "blocks.0.to_q.krona_A": torch.ones(2, 8, dtype=dtype)}
    assert "\n  1 tensor(s) not of floating-point numbers: blocks.0.to_q.krona_A" in problem(saved(tensors))


def test_all_problems_are_listed_and_long_lists_are_cut() -> None:
    tensors = {f"x{i}.krona_A": torch.full((1, 1), float("nan")) for i in range(5)}
    text = problem(saved(tensors))
    assert "5 tensor(s) not in this model: x0.krona_A, x1.krona_A, x2.krona_A and 2 more" in text
    assert "4 tensor(s) missing from the file" in text
    assert "5 tensor(s) without finite values" in text
    assert text.endswith("It looks made for another architecture.")


@pytest.mark.parametrize("fields", [{"a1": 5}, {"factor_pattern": {"to_q": (2, 7)}}, {"target_modules": ["norm"]}])
def test_a_config_whose_factors_no_layer_can_take_is_for_another_architecture(fields: dict[str, Any]) -> None:
    text = problem(saved(**fields))
    assert "blocks.0.to_q: a" in text or "norm: it is a LayerNorm" in text
    assert text.endswith("It looks made for another architecture.")


def test_a_config_that_means_no_layer_does_not_fit() -> None:
    assert "not in this model" in problem(saved(target_modules=["to_x"]))
    assert "means no layer" in problem(saved({}, target_modules=["to_x"]))


def test_copies_of_modules_to_save_are_expected_whole() -> None:
    copies = {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    check_fit(network(), saved({**fitting(), **copies}, modules_to_save=["norm"]))
    wrong = {**fitting(), "norm.weight": torch.ones(23)}
    text = problem(saved(wrong, modules_to_save=["norm"]))
    assert "1 tensor(s) missing from the file: norm.bias" in text
    assert "1 tensor(s) misshapen: norm.weight is 23, not 24" in text


def test_copies_are_expected_of_a_module_that_another_adapter_copied() -> None:
    model = network()
    inject_adapter_in_model(KronAConfig(a1=2, a2=8, modules_to_save=["norm"]), model, "first")
    copies = {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    check_fit(model, saved({**fitting(), **copies}, modules_to_save=["norm"]))


OPENED: list[str] = []
sys.addaudithook(lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None)


@pytest.mark.filterwarnings("ignore:It is not known whether ComfyUI finds")
@pytest.mark.parametrize("name", ["dog", "dog.safetensors", "dog-lokr.safetensors"])
def test_an_adapter_is_opened_once_and_nothing_is_drawn_at_random(name: str, tmp_path: Path) -> None:
    trained, path = network(), tmp_path / name
    for parameter in inject_krona(trained, KronAConfig(a1=2, a2=8)).parameters():
        nn.init.normal_(parameter)
    save_krona(trained, path, format="lokr" if "lokr" in name else "krona")
    model = network()
    before = torch.get_rng_state()
    OPENED.clear()
    load_krona(model, path)
    assert [one.endswith(".safetensors") for one in OPENED if str(tmp_path) in one].count(True) == 1
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(krona_layers(trained).values(), krona_layers(model).values(), strict=True):
        torch.testing.assert_close(other.get_delta_weight("default"), one.get_delta_weight("default"))
