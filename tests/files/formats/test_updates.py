"""What all kinds of update share: fitting a weight, DoRA, and how much a file holds."""

import json

import pytest
import torch
from torch import Tensor

from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.scales import HEADER
from diffusekrona.files.formats.updates import Update


def update(diff: Tensor, **parts: Tensor) -> Update:
    return foreign.parse({"x.diff": diff, **{f"x.{part}": tensor for part, tensor in parts.items()}}, source="dog")["x"]


FITS = [((2, 3), (2, 3)), ((2, 12), (2, 3, 2, 2)), ((2, 3, 1, 1), (2, 3)), ((2, 3), (2, 3, 1, 1)), ((2,), (2,))]
MISFITS = [
    ((3, 2), (2, 3)),
    ((2, 3), (2, 3, 2, 2)),
    ((2, 3, 2, 1), (2, 6)),
    ((2, 2, 3), (2, 3, 2)),
    ((4, 3), (2, 3, 2)),
]


@pytest.mark.parametrize(("delta", "weight"), FITS)
def test_the_change_has_the_weights_shape(delta: tuple[int, ...], weight: tuple[int, ...]) -> None:
    diff = torch.randn(*delta)
    change = update(diff).change(torch.zeros(weight, dtype=torch.bfloat16))
    assert change.dtype == torch.float32
    assert torch.equal(change, diff.reshape(weight))


@pytest.mark.parametrize(("delta", "weight"), MISFITS)
def test_a_weight_of_another_shape_is_refused(delta: tuple[int, ...], weight: tuple[int, ...]) -> None:
    found = " × ".join(map(str, weight))
    with pytest.raises(
        AdapterFileError, match=f"dog: the layer x was made for a weight of .*, but the one here is {found};"
    ):
        update(torch.zeros(delta)).change(torch.zeros(weight))


@pytest.mark.parametrize(
    "name",
    ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight", "dora_scale"],
)
def test_dora_sets_the_norm_of_every_row(name: str) -> None:
    weight, diff, magnitude = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5) + 1
    made = update(diff, **{name: magnitude if "lora" in name else magnitude[:, None]})
    changed = weight + made.change(weight)
    torch.testing.assert_close(changed.norm(dim=1), magnitude)
    torch.testing.assert_close(
        changed / magnitude[:, None], (weight + diff) / (weight + diff).norm(dim=1, keepdim=True)
    )
    assert made.parameters == 15 + 5


def test_doras_magnitudes_of_a_convolution_are_transposed_in_peft() -> None:
    weight, diff, magnitude = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3), torch.rand(1, 4, 1, 1) + 1
    rows = weight + update(diff, lora_magnitude_vector=magnitude).change(weight)
    torch.testing.assert_close(rows.flatten(1).norm(dim=1), magnitude.flatten())
    columns = weight + update(diff, dora_scale=magnitude).change(weight)
    torch.testing.assert_close(columns.transpose(0, 1).flatten(1).norm(dim=1), magnitude.flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dora_is_computed_in_fp32_whatever_the_weights_dtype(dtype: torch.dtype) -> None:
    weight, diff, magnitude = torch.randn(5, 3).to(dtype), torch.randn(5, 3), torch.rand(5, 1) + 1
    made = update(diff, dora_scale=magnitude)
    assert torch.equal(made.change(weight), made.change(weight.float()))
    assert made.change(weight).dtype == torch.float32


def test_a_layers_own_alpha_may_be_whole_and_wins_over_the_headers() -> None:
    tensors = {"x.lora_up.weight": torch.ones(3, 2), "x.lora_down.weight": torch.ones(2, 3), "x.alpha": torch.tensor(6)}
    header = {HEADER: json.dumps({"r": 2, "lora_alpha": 1})}
    assert torch.equal(foreign.parse(tensors, header)["x"].delta(), torch.full((3, 3), 6.0))


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    weight = torch.zeros(2, 3)
    weight[0] = 1
    changed = weight + update(torch.zeros(2, 3), dora_scale=torch.ones(2, 1)).change(weight)
    assert torch.equal(changed[1], torch.zeros(3))
    assert changed.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 1), (1, 2), (5, 3), ()])
def test_magnitudes_that_fit_neither_side_are_refused(shape: tuple[int, ...]) -> None:
    made = update(torch.zeros(5, 3), dora_scale=torch.ones(shape))
    with pytest.raises(
        AdapterFileError, match=r"dog: the layer x holds DoRA magnitudes of .* neither the 5 outputs nor the 3"
    ):
        made.change(torch.ones(5, 3))
