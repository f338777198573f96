"""Updates that are Kronecker products as adapters and back, and what is said of those that are none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusekrona import KronAConfig
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats.full import Full
from diffusekrona.files.formats.krona import SavedAdapter
from diffusekrona.files.formats.lora import LoRA
from diffusekrona.files.formats.updates import KroneckerUpdate, Update
from diffusekrona.files.kronecker import as_krona, krona_update, kronecker_only
from diffusekrona.files.parts import Assembled
from diffusekrona.files.unused import Unused
from tests.modules import network

WIDTH = 24
SOURCE = Path("dog.safetensors")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def product(a1: int = 2, a2: int = 8, scale: float = 1.0, terms: int | None = None) -> KroneckerUpdate:
    count = () if terms is None else (terms,)
    return KroneckerUpdate(random(*count, a1, a2), random(*count, WIDTH // a1, WIDTH // a2), scale, kind="lokr")


def of_rank(rank: int) -> KroneckerUpdate:
    left, right = random(12, rank), random(rank, 12)
    return KroneckerUpdate(random(2, 2), (left, right), kind="lokr")


LAYERS = {
    "alike": [product(), product()],
    "of other factors, scales and terms": [product(), product(4, 6, 0.5), product(terms=3)],
    "in the authors' layout": [replace(product(), layout="transposed")],
    "of one rank": [of_rank(2), of_rank(2)],
    "of two ranks": [of_rank(2), of_rank(3)],
    "partly of a rank": [of_rank(2), product(2, 2)],
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_products_become_an_adapter_and_are_the_same_updates_again(layers: list[KroneckerUpdate]) -> None:
    names = ["blocks.0.to_q", "blocks.1.to_q", "blocks.1.to_k"][: len(layers)]
    updates = dict(zip(names, layers, strict=True))
    saved = as_krona({("", name): update for name, update in updates.items()}, {"": network()}, SOURCE)[""]
    for name, update in updates.items():
        found = krona_update(name, saved)
        assert torch.equal(found.delta(), update.delta())
        assert (found.shapes, found.num_terms, found.layout) == (update.shapes, update.num_terms, update.layout)


@pytest.mark.parametrize(("layers", "rank"), [("of one rank", 2), ("of two ranks", None), ("partly of a rank", None)])
def test_products_of_products_stay_such_where_one_rank_tells_them(layers: str, rank: int | None) -> None:
    updates = {("", f"blocks.{n}.to_q"): update for n, update in enumerate(LAYERS[layers])}
    saved = as_krona(updates, {"": network()}, SOURCE)[""]
    assert saved.config.b_rank == rank
    assert any(key.endswith("krona_B1") for key in saved.tensors) == (rank is not None)


def test_each_component_has_an_adapter_of_its_own() -> None:
    updates = {(part, "blocks.0.to_q"): product() for part in ("unet", "text_encoder")}
    adapters = as_krona(updates, {"unet": network(), "text_encoder": network()}, SOURCE)
    assert list(adapters) == ["unet", "text_encoder"]


def test_two_layouts_are_not_one_adapter() -> None:
    updates = {("", "blocks.0.to_q"): product(), ("", "blocks.1.to_q"): replace(product(), layout="transposed")}
    with pytest.raises(AdapterFileError, match="mixes LoKr with layers of the paper authors' layout"):
        as_krona(updates, {"": network()}, SOURCE)


OTHERS: dict[str, tuple[Update, str]] = {
    "LoRA": (LoRA(random(WIDTH, 2), random(2, WIDTH), 1.0, kind="lora"), "holds LoRA updates"),
    "whole": (Full(random(WIDTH, WIDTH), kind="full"), "holds whole updates"),
    "DoRA": (replace(product(), dora_scale=random(WIDTH, 1)), "holds DoRA updates"),
    "norm": (Full(random(WIDTH), kind="full"), "changes norms"),
    "bias": (Full(None, bias=random(WIDTH), kind="full"), "changes biases"),
    "too many products": (product(12, 12, terms=9), "up to 9 products, which cost more"),
    "parts": (Assembled(((product(), (0, WIDTH)), (product(), (WIDTH, 2 * WIDTH))), 2 * WIDTH), "of other shapes"),
    "parts of LoRA": (
        Assembled(((LoRA(random(WIDTH, 2), random(2, WIDTH), 1.0, kind="lora"), (0, WIDTH)),), 2 * WIDTH),
        "holds LoRA updates",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_product_is_named_with_the_way_out(name: str) -> None:
    update, reason = OTHERS[name]
    unused = Unused(str(SOURCE))
    updates = {("unet", "to_q"): product(), ("unet", "to_k"): update}
    assert kronecker_only(updates, SOURCE, unused) == {("unet", "to_q"): updates["unet", "to_q"]}
    (text,) = unused.reasons
    assert text.startswith(f"{SOURCE} ")
    assert reason in text
    assert "(1 of 2 layers: unet.to_k). merge_file(pipe, path) merges them" in text
    assert ("convert --budget" in text) == (name not in ("DoRA", "norm", "bias"))


def test_a_product_is_used_without_its_bias_which_is_named() -> None:
    unused = Unused(str(SOURCE))
    updates = {("", "to_q"): replace(product(), bias=random(WIDTH))}
    assert list(kronecker_only(updates, SOURCE, unused)) == [("", "to_q")]
    assert "changes biases" in unused.reasons[0]


@pytest.mark.parametrize(
    ("factors", "problem"),
    [
        ({"A": (2, 8)}, "has not all factors of the layer x"),
        ({"A": (2, 8), "B1": (12, 1), "B": (12, 3)}, "has not all factors of the layer x"),
        ({"A": (2, 8), "B": (12,)}, "A of 2 × 8, B of 12, which do not fit each other"),
        ({"A": (2, 8), "B1": (12, 2), "B2": (3, 3)}, "B1 of 12 × 2, B2 of 3 × 3, which do not fit each other"),
        ({"A": (2, 2, 8), "B": (3, 12, 3)}, "A of 2 × 2 × 8, B of 3 × 12 × 3, which do not fit each other"),
        ({"A": (1 << 11, 1 << 11), "B1": (1 << 11, 1), "B2": (1, 1 << 11)}, "larger than any weight"),
    ],
)
def test_damaged_factors_are_named(factors: dict[str, tuple[int, ...]], problem: str) -> None:
    tensors = {f"x.krona_{key}": torch.zeros(shape) for key, shape in factors.items()}
    with pytest.raises(AdapterFileError, match=problem):
        krona_update("x", SavedAdapter(KronAConfig(), tensors, SOURCE))


def test_factors_without_finite_numbers_are_named() -> None:
    tensors = {"x.krona_A": torch.ones(2, 8), "x.krona_B": torch.full((12, 3), float("nan"))}
    with pytest.raises(AdapterFileError, match=r"dog\.safetensors: the layer x holds an infinity or a NaN"):
        krona_update("x", SavedAdapter(KronAConfig(), tensors, SOURCE))
