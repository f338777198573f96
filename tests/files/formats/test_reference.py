"""Checkpoints of the paper authors' own code: Aᵀ and B under LoRA's names, and a layer whose rows are permuted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.updates import KroneckerUpdate

sides = st.integers(1, 4)
NAME = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def checkpoint(A: Tensor, B: Tensor, name: str = NAME) -> dict[str, Tensor]:
    """As the authors' `KronALinearLayer` saves its two linear layers."""
    return {f"{name}_lora.down.weight": A.T.contiguous(), f"{name}_lora.up.weight": B}


def read(tensors: dict[str, Tensor]) -> KroneckerUpdate:
    (update,) = foreign.parse(tensors).values()
    assert isinstance(update, KroneckerUpdate)
    return update


def kinds(tensors: dict[str, Tensor]) -> set[str]:
    return {update.kind for update in foreign.parse(tensors).values()}


@given(sides, sides, sides, sides)
def test_the_update_computes_what_the_authors_layer_does(a1: int, a2: int, b1: int, b2: int) -> None:
    A, B, x = random(a1, a2), random(b1, b2), random(a2 * b2, seed=1)
    update = KroneckerUpdate(A, B, layout="transposed")
    # Theirs, for inputs of three dimensions: x as an a2 × b2 matrix X, then B (Xᵀ Aᵀ), which is b1 × a1, in a row.
    expected = (B @ (x.view(a2, b2).T @ A.T)).flatten()
    torch.testing.assert_close(update.delta() @ x, expected, atol=1e-5, rtol=1e-5)


def test_its_rows_are_those_of_the_kronecker_product_in_another_order() -> None:
    A, B = random(3, 2), random(4, 5)
    delta, kron = KroneckerUpdate(A, B, layout="transposed").delta(), torch.kron(A, B)
    for i in range(3):
        for k in range(4):
            assert torch.equal(delta[k * 3 + i], kron[i * 4 + k])


def test_a_checkpoint_is_told_by_ranks_that_no_lora_has() -> None:
    A, B = random(4, 64), random(10, 5)
    update = read(checkpoint(A, B))
    assert torch.equal(update.A, A)
    assert torch.equal(update.B, B)
    assert update.scale == 1.0
    assert update.kind == "reference"
    assert update.parameters == A.numel() + B.numel()


@pytest.mark.parametrize("style", ["_lora", ".lora", ".lora_layer", ".lora_linear_layer"])
def test_one_such_layer_makes_all_of_the_checkpoint_the_authors(style: str) -> None:
    """A square B has the shapes of a LoRA's up; the other layers tell."""
    square = {f"x{style}.down.weight": random(5, 4), f"x{style}.up.weight": random(10, 5)}
    assert kinds(square) == {"lora"}
    updates = foreign.parse(square | checkpoint(random(4, 64), random(10, 5)))
    assert [update.kind for update in updates.values()] == ["reference", "reference"]
    assert torch.equal(updates["x"].A, random(5, 4).T)


def test_kohyas_names_are_never_the_authors() -> None:
    tensors = {"x.lora_down.weight": random(64, 4), "x.lora_up.weight": random(10, 5)}
    square = {"y_lora.down.weight": random(5, 4), "y_lora.up.weight": random(10, 5)}
    for more in ({}, square, checkpoint(random(4, 64), random(10, 5))):
        with pytest.raises(AdapterFileError, match="the layer x holds up of 10 × 5, down of 64 × 4"):
            foreign.parse(tensors | more)


def test_an_alpha_with_such_shapes_is_a_damaged_lora() -> None:
    with pytest.raises(AdapterFileError, match=f"the layer {NAME} holds up and down of different ranks and an alpha"):
        foreign.parse(checkpoint(random(4, 64), random(10, 5)) | {f"{NAME}.alpha": torch.tensor(1.0)})


def test_half_a_layer_is_found() -> None:
    tensors = checkpoint(random(4, 64), random(10, 5))
    del tensors[f"{NAME}_lora.up.weight"]
    with pytest.raises(AdapterFileError, match=f"the layer {NAME} lacks up"):
        foreign.parse(tensors)
