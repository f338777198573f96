"""Whole updates, as LyCORIS writes them after fine-tuning every weight."""

import pytest
import torch
from lycoris import FullModule
from torch import nn

from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign


@pytest.mark.parametrize("base", [nn.Linear(4, 6, bias=False), nn.Conv2d(4, 6, 3, bias=False)], ids=["linear", "conv"])
def test_the_update_is_what_lycoris_own_layer_adds_to_the_weight(base: nn.Module) -> None:
    before = base.weight.detach().clone()
    made = FullModule("x", base)
    nn.init.normal_(made.weight)
    update = foreign.parse({f"x.{key}": tensor.detach() for key, tensor in made.state_dict().items()})["x"]
    assert update.kind == "full"
    assert update.parameters == before.numel()
    torch.testing.assert_close(before + update.change(before), made.weight.detach())


def test_an_alpha_does_not_count() -> None:
    diff = torch.arange(6.0).view(2, 3).bfloat16()
    update = foreign.parse({"x.diff": diff, "x.alpha": torch.tensor(4.0)})["x"]
    assert update.delta().dtype == torch.float32
    assert torch.equal(update.delta(), diff.float())


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_an_update_without_dimensions_or_entries_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterFileError, match="the layer x holds diff of shape"):
        foreign.parse({"x.diff": torch.ones(shape)})


def test_a_nan_is_found() -> None:
    with pytest.raises(AdapterFileError, match="the layer x holds an infinity or a NaN in diff"):
        foreign.parse({"x.diff": torch.tensor([[torch.nan]])})


NAMES = {"any layer": ("x.diff", "x.diff_b"), "a norm": ("x.w_norm", "x.b_norm")}


@pytest.mark.parametrize(("weight", "bias"), NAMES.values(), ids=NAMES)
def test_a_bias_goes_with_a_weight_or_comes_alone(weight: str, bias: str) -> None:
    diff, diff_b = torch.arange(6.0), torch.arange(6.0).bfloat16() + 1
    both = foreign.parse({weight: diff, bias: diff_b})["x"]
    assert torch.equal(both.delta(), diff)
    assert both.bias is not None
    assert (both.bias.dtype, both.bias.tolist()) == (torch.float32, diff_b.tolist())
    assert (both.parameters, both.bias_only) == (12, False)
    alone = foreign.parse({bias: diff_b})["x"]
    assert alone.bias_only
    assert torch.equal(alone.change_of_bias(torch.zeros(6)), diff_b.float())
    with pytest.raises(AdapterFileError, match="the layer x changes the bias only"):
        alone.delta()
    with pytest.raises(AdapterFileError, match="an infinity or a NaN in bias"):
        foreign.parse({bias: diff_b * torch.inf})


def test_factors_may_have_a_bias_beside_them() -> None:
    factors = {"x.lora_up.weight": torch.ones(4, 1), "x.lora_down.weight": torch.ones(1, 3), "x.diff_b": torch.ones(4)}
    update = foreign.parse(factors)["x"]
    assert (update.kind, update.bias_only) == ("lora", False)
    assert update.bias is not None
    assert update.bias.tolist() == [1.0] * 4
