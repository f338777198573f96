"""What a merge keeps, in one layer: every bit back, or the weight to rounding, whatever is merged beside it."""

import copy
import itertools
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from diffusekrona import KronAConfig, KronALayer
from diffusekrona.errors import MergeError
from diffusekrona.tuner.merged import ROUNDED
from tests.snapshots import bits

D, H = 12, 20
EXACTLY = pytest.mark.parametrize("keep", ["entries", "copy"])


def layer_of(*names: str, dtype: torch.dtype = torch.bfloat16, size: float = 0.3) -> KronALayer:
    torch.manual_seed(0)
    layer = KronALayer(nn.Linear(H, D, dtype=dtype))
    for number, name in enumerate(names):
        layer.update_layer(name, 2 + number, 4, init_b="normal")
        layer.krona_B[name].data.mul_(size)
    layer.set_adapter(list(names))
    return layer


def updates(layer: KronALayer, *names: str) -> Tensor:
    products = [torch.kron(layer.krona_A[name].double(), layer.krona_B[name].double()) for name in names]
    return sum(products, start=torch.zeros(D, H, dtype=torch.float64)).detach()


def merge(layer: KronALayer, names: list[str], keep: str) -> None:
    terms = layer.merge_terms(names)
    layer.check_mergeable(terms, keep)
    layer.set_merged(terms, keep)


def weight_of(layer: KronALayer) -> Tensor:
    return layer.base_layer.weight.detach()


def assert_near(weight: Tensor, expected: Tensor, roundings: int) -> None:
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=roundings * torch.finfo(weight.dtype).eps)


def test_without_keeping_adapters_are_added_and_subtracted_one_by_one():
    layer = layer_of("one", "two")
    before = weight_of(layer).double()
    merge(layer, ["one"], "nothing")
    first = weight_of(layer).clone()
    merge(layer, ["two"], "nothing")
    assert torch.equal(weight_of(layer), (first.float() + updates(layer, "two").float()).bfloat16())
    assert (layer.merged_adapters, layer.kept, layer.restoration.nbytes) == (["one", "two"], "nothing", 0)
    with pytest.warns(UserWarning, match="to rounding, not bit for bit"):
        layer.unmerge(["one"])
    assert_near(weight_of(layer), before + updates(layer, "two"), roundings=4)
    assert (layer.merged_adapters, layer.kept) == (["two"], "nothing")
    with pytest.warns(UserWarning, match="to rounding, not bit for bit"):
        layer.unmerge()
    assert_near(weight_of(layer), before, roundings=5)
    assert (layer.merged_adapters, layer.kept) == ([], None)


@EXACTLY
def test_part_of_what_is_merged_comes_out_and_the_rest_still_comes_back_exactly(keep):
    layer, alone = layer_of("one", "two"), layer_of("one", "two")
    before = weight_of(layer).clone()
    merge(layer, ["one", "two"], keep)
    merge(alone, ["two"], "entries")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.unmerge(["one"])
        assert torch.equal(weight_of(layer), weight_of(alone))
        assert layer.kept == keep
        layer.unmerge()
    assert torch.equal(weight_of(layer), before)


@pytest.mark.parametrize(("first", "second"), [("entries", "copy"), ("copy", "entries")])
def test_one_exact_way_may_follow_the_other(first, second):
    layer = layer_of("one", "two")
    before = weight_of(layer).clone()
    merge(layer, ["one"], first)
    merge(layer, ["two"], second)
    assert layer.kept == second
    layer.unmerge()
    assert torch.equal(weight_of(layer), before)


@pytest.mark.parametrize(
    ("first", "second"), [*itertools.product(["entries", "copy"], ["nothing"]), ("nothing", "entries")]
)
@pytest.mark.parametrize("names", [["two"], ["one"]], ids=["another", "the same"])
def test_exact_and_to_rounding_do_not_mix(first, second, names):
    layer = layer_of("one", "two")
    merge(layer, ["one"], first)
    merged = weight_of(layer).clone()
    with pytest.raises(MergeError, match=r"one is merged into it .*unmerge first, or merge with the same exact"):
        merge(layer, names, second)
    assert torch.equal(weight_of(layer), merged)
    assert (layer.merged_adapters, layer.kept) == (["one"], first)


def test_pefts_merge_is_exact_and_refuses_what_is_merged_otherwise():
    layer = layer_of("one", "two")
    merge(layer, ["one"], "nothing")
    merged = weight_of(layer).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of what is merged already
        layer.merge(adapter_names=["one"])
        with pytest.raises(MergeError, match="merged into it without what an exact unmerge needs"):
            layer.merge(adapter_names=["two"])
    assert torch.equal(weight_of(layer), merged)
    assert layer_with_pefts_merge().kept == "entries"


def layer_with_pefts_merge() -> KronALayer:
    layer = layer_of("one")
    layer.merge()
    return layer


@pytest.mark.parametrize("beside", [False, True], ids=["nothing more", "another"])
def test_merging_for_good_over_what_was_merged_to_rounding_subtracts_nothing(beside):
    torch.manual_seed(0)
    config = KronAConfig(a1=2, a2=4, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(H, D)), config, "one")
    model.add_adapter("two", KronAConfig(a1=3, a2=4, target_modules=["0"], init_weights=False))
    model.base_model.set_adapter(["one", "two"])
    layer = model.base_model.model[0]
    expected = weight_of(layer).double() + updates(layer, "one", *["two"] * beside)
    merge(layer, ["one"], "nothing")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ROUNDED)
        merged = model.merge_and_unload(adapter_names=["one", "two"] if beside else ["one"])
    assert_near(merged[0].weight.detach(), expected, roundings=4)


@pytest.mark.parametrize("keep", ["entries", "copy", "nothing"])
@pytest.mark.parametrize("first", ["copy", "original"])
def test_deep_copies_come_back_alone(keep, first):
    layer = layer_of("one")
    before = bits(layer)
    merge(layer, ["one"], keep)
    other = copy.deepcopy(layer)
    gone, left = (other, layer) if first == "copy" else (layer, other)
    merged = bits(left)
    quietly_unmerged(gone)
    assert bits(left) == merged
    assert left.kept == keep
    quietly_unmerged(left)
    assert bits(left) == bits(gone)
    assert keep == "nothing" or bits(left) == before


def quietly_unmerged(layer: KronALayer) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ROUNDED)
        layer.unmerge()


@pytest.mark.parametrize("keep", ["entries", "copy", "nothing"])
def test_a_cast_while_merged_is_refused_whatever_was_kept(keep):
    layer = layer_of("one")
    merge(layer, ["one"], keep)
    layer.base_layer.float()
    before = weight_of(layer).clone()
    with pytest.raises(MergeError, match="cast only unmerged models"):
        layer.unmerge()
    assert torch.equal(weight_of(layer), before)
