"""Factors given by b1 and a2, and the scale alpha / √(num_terms · a2), as CDKA has them (arXiv 2602.01267)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusekrona import KronAConfig, KronAModel, hotswap_krona, inject_krona, load_krona, merge_krona, save_krona
from diffusekrona.bases.architectures import build
from diffusekrona.errors import FactorShapeError
from diffusekrona.kron.shapes import divisors, lora_parameters
from diffusekrona.tuner.injected import adapter_tensors, krona_layers
from tests.modules import inputs, network

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
DEFAULTS = {"b1": 2, "a2": 8, "num_terms": 4, "alpha": 16.0, "scaling": "cdka"}
"""The paper's own."""


def config(**fields: object) -> KronAConfig:
    return KronAConfig(**{"b1": 2, "a2": 4, "target_modules": TARGETS, "init_weights": False, **fields})


def linear(d: int, h: int, **fields: object) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(h, d))
    inject_krona(model, KronAConfig(target_modules=["0"], init_weights=False, **fields))
    return model


sizes = st.integers(1, 48)


@given(st.data(), sizes, sizes, st.integers(1, 5))
def test_b1_and_a2_give_the_shapes_in_every_layer(data: st.DataObject, d: int, h: int, terms: int) -> None:
    b1, a2 = data.draw(st.sampled_from(divisors(d))), data.draw(st.sampled_from(divisors(h)))
    model = linear(d, h, b1=b1, a2=a2, num_terms=terms)
    found = [tuple(factor.shape[-2:]) for factor in adapter_tensors(model, "default").values()]
    assert found == [(d // b1, a2), (b1, h // a2)]
    assert sum(f.numel() for f in adapter_tensors(model, "default").values()) == terms * (d // b1 * a2 + b1 * (h // a2))


@given(sizes, sizes, st.integers(1, 5))
def test_with_one_row_and_one_column_it_is_a_lora(d: int, h: int, r: int) -> None:
    model = linear(d, h, b1=1, a2=1, num_terms=r)
    factors = adapter_tensors(model, "default")
    assert sum(factor.numel() for factor in factors.values()) == lora_parameters(d, h, r)
    down, up = factors["0.krona_B"].reshape(r, h), factors["0.krona_A"].reshape(r, d).T
    torch.testing.assert_close(model[0].get_delta_weight("default"), up @ down)


@pytest.mark.parametrize(("terms", "millions"), [(1, 2.86), (4, 11.4)])
def test_the_papers_own_count_for_sdxl(terms: int, millions: float) -> None:
    krona = inject_krona(build("sdxl"), KronAConfig(**{**DEFAULTS, "num_terms": terms}))
    assert sum(factor.numel() for factor in krona.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_scale_is_alpha_over_the_root_of_terms_and_columns() -> None:
    patterns = {
        "factor_pattern": {"to_k": (4, 2)},
        "alpha_pattern": {"to_v": 3.0},
        "terms_pattern": {"to_out.0": 9},
    }
    model = network()
    inject_krona(model, config(alpha=16.0, num_terms=2, scaling="cdka", **patterns))
    expected = {"to_q": 16 / math.sqrt(2 * 4), "to_k": 16 / math.sqrt(2 * 2), "to_v": 3 / math.sqrt(2 * 4)}
    expected["to_out.0"] = 16 / math.sqrt(9 * 4)
    for name, layer in krona_layers(model).items():
        assert layer.scaling["default"] == pytest.approx(next(s for end, s in expected.items() if name.endswith(end)))
    layer = next(iter(krona_layers(model).values()))
    dense = sum(torch.kron(A, B) for A, B in layer.factors("default"))
    torch.testing.assert_close(layer.get_delta_weight("default"), layer.scaling["default"] * dense)


@pytest.mark.parametrize("name", ["adapter", "adapter.safetensors"])
def test_it_is_saved_loaded_swapped_and_merged_as_any_adapter(name: str, tmp_path: Path) -> None:
    model, others = network(), (network(), network())
    inject_krona(model, config(alpha=1.5, num_terms=2, scaling="cdka"))
    expected = model(*inputs())
    save_krona(model, tmp_path / name)
    load_krona(others[0], tmp_path / name)
    assert torch.equal(others[0](*inputs()), expected)
    held = others[0].peft_config["default"]
    assert (held.a1, held.b1, held.scaling) == (None, 2, "cdka")
    inject_krona(others[1], config(num_terms=2, scaling="alpha"))
    hotswap_krona(others[1], tmp_path / name)
    for other in others:
        merge_krona(other)
        torch.testing.assert_close(other(*inputs()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:It is not known", "ignore:LyCORIS, by which")
def test_one_product_goes_out_as_lokr_and_comes_back(tmp_path: Path) -> None:
    model, other = network(), network()
    inject_krona(model, config(alpha=16.0, scaling="cdka"))
    save_krona(model, tmp_path / "lokr.safetensors", format="kohya")
    load_krona(other, tmp_path / "lokr.safetensors")
    torch.testing.assert_close(other(*inputs()), model(*inputs()))


def test_weighted_sums_keep_the_scale() -> None:
    model = KronAModel(network(), config(alpha=16.0, scaling="cdka"), "one")
    model.add_weighted_adapter(["one"], [0.5], "part")
    for layer in krona_layers(model.model).values():
        assert layer.scaling["one"] == 8.0
        torch.testing.assert_close(layer.get_delta_weight("part"), 0.5 * layer.get_delta_weight("one"))


def test_a_b1_that_does_not_divide_the_outputs_is_refused_with_its_neighbours() -> None:
    model = network()
    with pytest.raises(FactorShapeError, match=r"b1=7 does not divide its \d+ output features \(nearest divisors: "):
        inject_krona(model, config(b1=7))
    assert not krona_layers(model)
