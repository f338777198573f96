"""Weighted sums of adapters: exact, and the nearest in fewer terms."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from diffusekrona.errors import AdapterNameError, ConfigError, FactorShapeError
from diffusekrona.tuner.injected import krona_layers
from diffusekrona.tuner.layer import KronALayer
from tests.kinds import (
    CLIP,
    DECODER,
    MLP,
    UNET,
    Kind,
    assert_computes,
    delta,
    dense,
    factors,
    half_types,
    kinds,
    lora,
    numbers,
    output,
    quiet,
    same_factors,
    trainable,
)
from tests.snapshots import unchanged

pytestmark = quiet


@kinds
@pytest.mark.parametrize("second", [{}, {"num_terms": 2, "alpha": -0.5}, {"b_rank": 1}], ids=str)
@pytest.mark.parametrize("first", [{}, {"b_rank": 1}, {"b_rank": 2, "num_terms": 2, "alpha": 0.3}], ids=str)
def test_a_weighted_sum_is_one_adapter_that_saves_and_loads(
    kind: Kind, first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    model = kind.adapted("one", **first)
    model.add_adapter("two", kind.config(**second))
    for layer in krona_layers(model).values():
        layer.set_scale("two", 3.0)
    before = copy.deepcopy([*factors(model, "one").values(), *factors(model, "two").values()])
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum")
    assert model.active_adapters == ["one"]
    assert trainable(model) == {"one"}
    after = [*factors(model, "one").values(), *factors(model, "two").values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    config = model.peft_config["sum"]
    assert config.num_terms == model.peft_config["one"].num_terms + model.peft_config["two"].num_terms
    assert config.alpha == 1
    for layer in krona_layers(model).values():
        expected = 0.5 * delta(layer, "one") - 2.0 * delta(layer, "two")
        torch.testing.assert_close(delta(layer, "sum"), expected, rtol=1e-6, atol=1e-6)
    model.set_adapter("sum")
    assert_computes(kind, model, one=0.5, two=-2.0)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path / "sum", "sum")
    assert same_factors(loaded, model, "sum", "sum")
    assert torch.equal(output(kind, loaded), output(kind, model))


@kinds
@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_adapters_with_terms_of_a_layers_own_have_sums(kind: Kind, combination: str, tmp_path: Path) -> None:
    own = {"to_q|q_proj|lin0": 2}
    model = kind.adapted("one", terms_pattern=own)
    model.add_adapter("two", kind.config(num_terms=2, terms_pattern={"to_k|out_proj|down_proj|lin1_default": 1}))
    most = None if combination == "cat" else 4
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum", combination, num_terms=most)
    config = model.peft_config["sum"]
    assert (config.num_terms, config.terms_pattern) == (4, {})
    for layer in krona_layers(model).values():
        # Four terms are all that both have together, so the nearest is the exact sum, too.
        expected = 0.5 * delta(layer, "one") - 2.0 * delta(layer, "two")
        torch.testing.assert_close(delta(layer, "sum"), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert same_factors(PeftModel.from_pretrained(kind.base(), tmp_path / "sum", "sum"), model, "sum", "sum")


def test_products_stay_products_in_a_sum_of_products_alone() -> None:
    model = CLIP.adapted("one", b_rank=1)
    model.add_adapter("two", CLIP.config(b_rank=2, num_terms=2))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert model.peft_config["sum"].b_rank == 2
    assert all("sum" in layer.krona_B1 and layer.shapes("sum").b_rank == 2 for layer in krona_layers(model).values())


def test_a_sum_of_adapters_on_different_layers_is_on_all_of_them(tmp_path: Path) -> None:
    fields = {"layers_to_transform": [0], "exclude_modules": ["o_proj"]}
    model = DECODER.adapted("one", target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 0.5}, **fields)
    pattern = {"o_proj": (4, 2)}
    model.add_adapter("two", DECODER.config(target_modules=r".*\.(v|o)_proj", num_terms=2, factor_pattern=pattern))
    model.add_weighted_adapter(["one", "two", "two"], [-1.0, 1.0, 2.0], "sum")
    assert isinstance(model.peft_config["sum"].target_modules, set)
    names = {name for name, layer in krona_layers(model).items() if "sum" in layer.krona_A}
    assert len(names) == len(krona_layers(model)) == 1 + 2 + 2
    model.set_adapter("sum")
    assert_computes(DECODER, model, one=-1.0, two=3.0)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(DECODER.base(), tmp_path / "sum")
    assert torch.equal(output(DECODER, loaded), output(DECODER, model))


def update(layer: KronALayer, name: str) -> Tensor:
    """ΔW of an adapter in the order of outputs that its layout says."""
    W = delta(layer, name)
    a1 = layer.krona_A[name].shape[-2]
    return W.unflatten(0, (a1, -1)).transpose(0, 1).flatten(0, 1) if layer.layout[name] == "transposed" else W


def nearest(W: Tensor, a1: int, a2: int, num_terms: int, layout: str) -> Tensor:
    """By the singular vectors of the rearranged matrix."""
    split = W.flatten(1).unflatten(1, (a2, -1)).unflatten(0, (-1, a1) if layout == "transposed" else (a1, -1))
    split = split.transpose(0, 1) if layout == "transposed" else split
    R = split.transpose(1, 2)
    U, S, V = torch.linalg.svd(R.flatten(2).flatten(0, 1), full_matrices=False)
    split = ((U[:, :num_terms] * S[:num_terms]) @ V[:num_terms]).view(R.shape).transpose(1, 2)
    split = split.transpose(0, 1) if layout == "transposed" else split
    return split.reshape(W.shape)


@pytest.mark.parametrize(
    ("one", "two", "num_terms"),
    [
        ({}, {}, None),
        ({"num_terms": 2}, {"b_rank": 1}, None),
        ({"alpha": 0.3}, {"a1": 4, "a2": 2}, 2),
        ({"layout": "transposed"}, {"layout": "transposed", "a1": 4}, 1),
        ({"layout": "transposed", "num_terms": 3}, {"layout": "transposed"}, 2),
    ],
    ids=str,
)
def test_a_sum_is_compressed_to_the_nearest_adapter(
    one: dict[str, Any], two: dict[str, Any], num_terms: int | None, tmp_path: Path
) -> None:
    kind = DECODER if "layout" in one else UNET
    model = kind.adapted("one", **one)
    model.add_adapter("two", kind.config(**two))
    for layer in krona_layers(model).values():
        layer.set_scale("two", 3.0)
    kept = copy.deepcopy([*factors(model, "one").values(), *factors(model, "two").values()])
    error = model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum", "svd", num_terms)
    assert all(map(torch.equal, kept, [*factors(model, "one").values(), *factors(model, "two").values()]))
    terms = num_terms or one.get("num_terms", 1)
    assert model.peft_config["sum"].num_terms == terms
    missed, whole = 0.0, 0.0
    for layer in krona_layers(model).values():
        exact = 0.5 * update(layer, "one") - 2.0 * update(layer, "two")
        expected = nearest(exact, 2, 4, terms, one.get("layout", "kron"))
        torch.testing.assert_close(update(layer, "sum"), expected, rtol=1e-5, atol=1e-6)
        missed, whole = missed + float((exact - expected).square().sum()), whole + float(exact.square().sum())
    assert error == pytest.approx((missed / whole) ** 0.5, rel=1e-6)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path / "sum", "sum")
    assert torch.equal(output(kind, loaded), output(kind, model))


def test_enough_terms_leave_no_error() -> None:
    model = MLP.adapted("one")
    model.add_adapter("two", MLP.config(num_terms=2))
    assert model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "exact") == 0
    assert model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "near", "svd", 3) < 1e-7
    for layer in krona_layers(model).values():
        torch.testing.assert_close(delta(layer, "near"), delta(layer, "exact"), rtol=1e-5, atol=1e-6)


class Alike(nn.Module):
    """Layers whose names end as others' do: PEFT takes a name for each that ends so at a dot."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"proj": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
        self.outer = nn.ModuleDict({"inner": nn.ModuleDict({"proj": nn.Linear(8, 8)})})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["other"](self.outer["inner"]["proj"](self.inner["proj"](self.proj(x))))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"target_modules": "proj"}, {"target_modules": r"outer\.inner\.proj"}),
        ({"target_modules": r"inner\.proj"}, {"target_modules": r"inner\.other"}),
        (
            {"target_modules": r"proj|inner\.other"},
            {"target_modules": ["proj"], "exclude_modules": ["other"], "factor_pattern": {r"inner\.proj": (4, 4)}},
        ),
        (
            {"target_modules": r"proj", "a1": 4},
            {"target_modules": r"(inner|outer\.inner)\.proj", "a1": 1},
        ),
    ],
    ids=["one of three", "inner alone", "patterns", "the shortest name differs"],
)
def test_a_sum_names_its_layers_apart_where_names_are_alike(
    one: dict[str, Any], two: dict[str, Any], tmp_path: Path
) -> None:
    kind = Kind(Alike, {"x": numbers(2, 8)}, (), "")
    model = kind.adapted("one", **one)
    model.add_adapter("two", kind.config(**two))
    expected = dense(kind, model, {"one": 1.0, "two": 2.0})
    adapted = set(krona_layers(model))
    model.add_weighted_adapter(["one", "two"], [1.0, 2.0], "sum")
    assert {name for name, layer in krona_layers(model).items() if "sum" in layer.krona_A} == adapted
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path / "sum")
    assert set(krona_layers(loaded)) == adapted
    torch.testing.assert_close(output(kind, loaded).double(), output(kind, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [[-1.0, 1.0], [1.0, -1.0]], ids=str)
def test_an_adapter_minus_itself_is_nothing(weights: list[float]) -> None:
    model = UNET.adapted("one")
    model.add_weighted_adapter(["one", "one"], weights, "sum")
    assert all(not bool(layer.get_delta_weight("sum").any()) for layer in krona_layers(model).values())


def test_a_sum_takes_over_what_one_adapter_trains_in_full() -> None:
    model = MLP.adapted("one")
    model.add_adapter("two", MLP.config(modules_to_save=["head"]))
    copies = model.get_base_model().head.modules_to_save
    nn.init.normal_(copies["two"].weight)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert model.peft_config["sum"].modules_to_save == ["head"]
    assert torch.equal(copies["sum"].weight, copies["two"].weight)
    assert copies["sum"].weight is not copies["two"].weight


@half_types
def test_a_sum_is_fp32_whatever_its_parts(dtype: torch.dtype) -> None:
    model = get_peft_model(MLP.base().to(dtype), MLP.config(), "one", autocast_adapter_dtype=False)
    model.add_weighted_adapter(["one"], [1 / 3], "sum")
    for layer in krona_layers(model).values():
        assert layer.krona_A["sum"].dtype == torch.float32
        torch.testing.assert_close(layer.krona_A["sum"], layer.krona_A["one"].float() / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"adapters": ["one", "shaped"]}, FactorShapeError, r"lin0: \(2, 4\) in 'one', \(4, 4\) in 'shaped'"),
        ({"adapters": ["one", "turned"]}, ConfigError, "different layouts"),
        ({"adapters": ["one", "unknown"]}, AdapterNameError, "No KronA adapter is named 'unknown'"),
        ({"adapters": ["one", "lora"]}, AdapterNameError, "No KronA adapter is named 'lora'"),
        ({"adapter_name": "one"}, AdapterNameError, "There is an adapter named 'one'"),
        ({"adapter_name": "half"}, AdapterNameError, "An adapter cannot be named .half."),
        ({"weights": [1.0]}, ConfigError, "not 2 and 1"),
        ({"adapters": [], "weights": []}, ConfigError, "not 0 and 0"),
        ({"weights": [1.0, float("nan")]}, ConfigError, "finite"),
        ({"combination_type": "linear"}, ConfigError, "'cat', the exact sum"),
        ({"num_terms": 2}, ConfigError, "is for combination_type='svd'"),
        ({"combination_type": "svd", "num_terms": 0}, ConfigError, "at least 1, not 0"),
        ({"adapters": ["copies", "copies too"]}, ConfigError, "'copies' and 'copies too' have a module"),
    ],
    ids=str,
)
def test_a_sum_that_cannot_be_is_an_error_that_changes_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = MLP.adapted("one", target_modules=["lin0"])
    others: dict[str, dict[str, Any]] = {
        "two": {},
        "shaped": {"a1": 4},
        "turned": {"layout": "transposed"},
        "copies": {"modules_to_save": ["head"]},
        "copies too": {"modules_to_save": ["head"]},
    }
    for name, fields in others.items():
        model.add_adapter(name, MLP.config(target_modules=["lin0"], **fields))
    inject_adapter_in_model(lora(MLP), model.get_base_model(), "lora")
    given = {"adapters": ["one", "two"], "weights": [1.0, 1.0], "adapter_name": "sum", **arguments}
    with unchanged(model), pytest.raises(error, match=message):
        model.add_weighted_adapter(**given)
