"""Rows of updates, and updates put together from rows, against the rows of the dense ΔW."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats.full import Full
from diffusekrona.files.formats.loha import LoHa
from diffusekrona.files.formats.lora import LoRA
from diffusekrona.files.formats.updates import KroneckerUpdate, Update
from diffusekrona.files.parts import Assembled, Piece, assembled, cut

D, H = 12, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def krona(a1: int = 3, a2: int = 4, d: int = D, terms: int = 1, seed: int = 0, scale: float = 0.5) -> KroneckerUpdate:
    """A product of d × H, or a sum of them."""
    count = (terms,) if terms > 1 else ()
    A, B = random(*count, a1, a2, seed=seed), random(*count, d // a1, H // a2, seed=seed + 1)
    return KroneckerUpdate(A, B, scale, kind="lokr", parameters=A.numel() + B.numel())


def lora(d: int = D, **more: Tensor) -> LoRA:
    return LoRA(random(d, 2), random(2, H), 0.5, kind="lora", parameters=2 * (d + H), **more)


left, right = random(4, 1), random(1, 2)
UPDATES: dict[str, Update] = {
    "product": krona(),
    "several products": krona(terms=3),
    "product of a product": replace(krona(), held_b=(left, right)),
    "product in the authors' layout": replace(krona(), layout="transposed"),
    "product of a convolution": KroneckerUpdate(random(3, 4), random(4, 2 * 9), 2.0),
    "LoRA": lora(),
    "LoRA of a convolution": LoRA(random(D, 2, 1, 1), random(2, H, 3, 3), 2.0),
    "LoRA with a core": LoRA(random(D, 2, 1, 1), random(2, H, 1, 1), 2.0, random(2, 2, 3, 3)),
    "LoHa": LoHa(random(D, 2), random(2, H), random(D, 2, seed=1), random(2, H, seed=1), 0.5),
    "LoHa with cores": LoHa(
        random(2, D), random(2, H), random(2, D, seed=1), random(2, H, seed=1), 0.5, (random(2, 2, 3), random(2, 2, 3))
    ),
    "whole": Full(random(D, H)),
    "norm": Full(random(D)),
}

updates = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6)


# Rows of a file's layer


@updates
@pytest.mark.parametrize("rows", [(0, 4), (4, 8), (2, 7), (11, 12), (0, 12)], ids=str)
def test_the_update_of_some_rows_is_those_rows_of_the_update(update: Update, rows: tuple[int, int]) -> None:
    own = cut(replace(update, bias=torch.arange(12.0)), rows, D)
    close(own.delta(), update.delta()[slice(*rows)])
    assert own.bias is not None
    assert own.bias.tolist() == list(range(*rows))
    assert (own.kind, own.where) == (update.kind, update.where)


def test_rows_of_a_product_are_products_and_counted_as_such() -> None:
    own = cut(krona(a1=2), (0, 4), D)
    assert isinstance(own, KroneckerUpdate)
    assert own.num_terms == 2  # B has three thirds of 2 rows, two of which are there
    assert own.parameters == own.A.numel() + own.B.numel()
    whole = cut(krona(a1=3), (4, 8), D)
    assert isinstance(whole, KroneckerUpdate)
    assert (whole.num_terms, whole.A.dim()) == (1, 2)
    assert cut(lora(), (0, 3), D).parameters == lora().parameters // 4


def test_a_bias_alone_is_cut_too() -> None:
    own = cut(Full(None, bias=torch.arange(12.0)), (3, 6), D)
    assert own.bias_only
    assert own.bias is not None
    assert own.bias.tolist() == [3, 4, 5]


@pytest.mark.parametrize("name", ["product", "LoRA", "LoHa", "whole"])
def test_magnitudes_of_outputs_go_with_their_rows(name: str) -> None:
    weight = random(D, H, seed=5)
    update = replace(UPDATES[name], dora_scale=random(D, 1).abs() + 1)
    for rows in ((0, 4), (4, 12)):
        close(cut(update, rows, D).change(weight[slice(*rows)]), update.change(weight)[slice(*rows)])


def test_magnitudes_of_inputs_are_refused_by_name() -> None:
    update = replace(lora(), dora_scale=random(1, H), where="dog: the layer x")
    with pytest.raises(AdapterFileError, match=r"^dog: the layer x has DoRA's magnitudes for each input"):
        cut(update, (0, 4), D)


@updates
def test_an_update_of_another_size_is_refused(update: Update) -> None:
    with pytest.raises(AdapterFileError, match=r"has 12 outputs, and the layers .* have 24 together"):
        cut(update, (0, 8), 24)
    with pytest.raises(AdapterFileError, match=r"has 12 outputs, but goes into 6 rows"):
        assembled([Piece(update, (0, 6))], D)


# A module of several of a file's layers


@updates
def test_what_was_cut_is_put_together_again(update: Update) -> None:
    update = replace(update, bias=torch.arange(12.0))
    cuts = [(0, 4), (4, 6), (6, 12)]
    whole = assembled([Piece(cut(update, rows, D), rows) for rows in cuts], D)
    close(whole.delta(), update.delta())
    assert whole.bias is not None
    assert torch.equal(whole.bias, torch.arange(12.0))
    swapped = assembled([Piece(cut(update, (0, 6), D), (6, 12)), Piece(cut(update, (6, 12), D), (0, 6))], D)
    close(swapped.delta(), update.delta().roll(6, 0))


def test_a_piece_for_all_rows_stays_itself() -> None:
    update = lora()
    assert assembled([Piece(update)], D) is update


@pytest.mark.parametrize(
    "pieces",
    [
        [krona(a1, d=d, seed=seed, scale=seed) for seed, (a1, d) in enumerate([(2, 12), (2, 12), (2, 12)], 1)],
        [krona(3, d=12, seed=1, terms=2), krona(1, d=4, seed=2, scale=-1.0)],
        [krona(2, d=12, seed=1), krona(3, d=12, seed=2)],  # B of 6 rows and of 4: in parts of 2
    ],
)
@pytest.mark.parametrize("margin", [0, 2])
def test_products_become_a_sum_of_products(pieces: list[KroneckerUpdate], margin: int) -> None:
    placed, first = [], margin
    for piece in pieces:
        placed.append(Piece(replace(piece, where=f"layer {first}"), (first, first + piece.shapes.d)))
        first += piece.shapes.d
    whole = assembled(placed, first + margin)
    assert isinstance(whole, KroneckerUpdate)
    zeros = torch.zeros(margin, H)
    expected = torch.cat([zeros, *(piece.delta() for piece in pieces), zeros])
    assert torch.equal(whole.delta(), expected)
    assert whole.where == f"layer {margin}"


@pytest.mark.parametrize("second", [lora(6), krona(a1=3, a2=2, d=6), Full(random(6, H))], ids=["LoRA", "a2", "whole"])
def test_other_mixtures_are_put_together_densely(second: Update) -> None:
    first = krona(d=6)
    whole = assembled([Piece(second, (8, 14)), Piece(first, (0, 6))], 16)
    assert isinstance(whole, Assembled)
    assert whole.has_delta
    weight = random(16, H, seed=9)
    expected = torch.cat([first.delta(), torch.zeros(2, H), second.delta(), torch.zeros(2, H)])
    close(whole.delta(), expected)
    close(whole.change(weight), expected)
    assert whole.parameters == first.parameters + second.parameters


def test_magnitudes_count_for_the_rows_of_their_piece() -> None:
    weight = random(12, H, seed=9)
    pieces = [replace(krona(d=6, seed=n), dora_scale=random(*size).abs()) for n, size in enumerate([(6, 1), (1, H)])]
    whole = assembled([Piece(pieces[0], (0, 6)), Piece(pieces[1], (6, 12))], 12)
    close(whole.change(weight), torch.cat([pieces[0].change(weight[:6]), pieces[1].change(weight[6:])]))
    assert not whole.has_delta  # so nothing is nearest to it


def test_pieces_that_change_a_bias_alone_leave_the_weight() -> None:
    bias = Full(None, bias=torch.ones(6))
    whole = assembled([Piece(bias, (0, 6)), Piece(bias, (6, 12))], 12)
    assert whole.bias_only
    mixed = assembled([Piece(bias, (0, 6)), Piece(krona(d=6), (6, 12))], 12)
    assert not mixed.bias_only
    expected = torch.cat([torch.zeros(6, H), krona(d=6).delta()])
    close(mixed.delta(), expected)
    close(mixed.change(random(12, H)), expected)
    assert mixed.bias is not None
    assert torch.equal(mixed.bias, torch.cat([torch.ones(6), torch.zeros(6)]))
