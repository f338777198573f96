"""What a step costs, against counted operations of the real step and of PEFT's own modules."""

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from peft import LoKrConfig, LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from diffusekrona import KronALayer
from diffusekrona.kron import costs
from diffusekrona.kron import shapes as factors
from diffusekrona.kron.costs import StepCost
from diffusekrona.kron.products import kron_linear_a_first, kron_linear_b_first
from diffusekrona.kron.shapes import FactorShapes, factor_shapes
from tests.kron.test_shapes import adapted_by_peft, few, legal_layers, lokr_factors, quick

NEW_TORCH = hasattr(torch.backends, "fp32_precision")
"""Whether it is 2.9 or newer."""


class Products(TorchDispatchMode):
    """Counts the elements that elementwise products make."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mul:
            self.total += result.numel()
        return result


def counted_multiply_adds(run) -> int:
    with Products() as products, FlopCounterMode(display=False) as matmuls:
        run()
    # The counter counts a multiply-add of a matrix product as two operations.
    return products.total + matmuls.get_total_flops() // 2


class Work(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, and the elements that operations read and write.

    A view moves no element, an expanded tensor only those it holds.
    """

    PRODUCTS = frozenset(["mm", "bmm", "addmm_", "baddbmm_"])

    MOVE_NOTHING = frozenset(["view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "detach"])
    DECIDE_ON_DROPOUT = frozenset(["rand", "gt", "_local_scalar_dense"])

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.PRODUCTS:
            self.multiply_adds += args[-2].numel() * args[-1].shape[-1]
        if name not in self.MOVE_NOTHING | self.DECIDE_ON_DROPOUT:
            touched = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.elements += sum(min(t.numel(), t.untyped_storage().nbytes() // t.element_size()) for t in touched)
        return result


def counted_step(layer: nn.Module, d: int, h: int, tokens: int) -> StepCost:
    """Forward and backward of a layer, counted while it runs."""
    x, output_gradient = torch.randn(tokens, h, requires_grad=True), torch.randn(tokens, d)
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    with Work() as work:
        torch.autograd.grad(layer(x), wanted, output_gradient)
    return StepCost(work.multiply_adds, work.elements)


@few
@given(shapes=legal_layers(), tokens=st.integers(1, 5))
def test_krona_multiply_adds_are_those_that_both_orders_do(shapes, tokens):
    x = torch.randn(tokens, shapes.h)
    A, B = torch.randn(shapes.a1, shapes.a2), torch.randn(shapes.b1, shapes.b2)
    for order, product in (("A first", kron_linear_a_first), ("B first", kron_linear_b_first)):
        done = counted_multiply_adds(lambda product=product: product(x, A, B))
        assert costs.krona_multiply_adds(shapes, order, tokens) == done


@quick
@given(shapes=legal_layers(70))
def test_cheapest_order_needs_no_more_multiply_adds_than_the_other(shapes):
    each = {order: costs.krona_multiply_adds(shapes, order) for order in ("A first", "B first")}
    assert each[costs.cheapest_order(shapes)] == min(each.values())
    if len(set(each.values())) == 1:
        assert costs.cheapest_order(shapes) == "A first"


def test_a_first_wins_where_the_paper_puts_the_smaller_factor_first():
    """At (4, 64) on 1280 × 1280, B first would need sixteen times the multiply-adds of A first."""
    shapes = factor_shapes(1280, 1280, 4, 64)
    assert costs.cheapest_order(shapes) == "A first"
    each = [costs.krona_multiply_adds(shapes, order) for order in ("A first", "B first")]
    assert each == [4 * 64 * 20 + 4 * 20 * 320, 64 * 20 * 320 + 4 * 64 * 320]
    assert each[1] == 16 * each[0]


@few
@given(st.tuples(*[st.integers(2, 9)] * 4).map(lambda sizes: FactorShapes(*sizes)), st.integers(2, 9))
@example(FactorShapes(2, 8, 9, 2), 5).via("A first")
@example(FactorShapes(8, 2, 2, 9), 5).via("B first")
@example(FactorShapes(9, 9, 2, 2), 5).via("the products of the gradient of A are larger than what they are made of")
@example(FactorShapes(2, 8, 9, 2), 50).via("A first, into a merged weight")
@example(FactorShapes(8, 2, 2, 9), 50).via("B first, into a merged weight")
def test_a_step_with_krona_takes_what_is_counted(shapes, tokens):
    d, h = shapes.d, shapes.h
    base = nn.Linear(h, d, bias=False).requires_grad_(False)
    assert costs.frozen_step(d, h, tokens) == counted_step(base, d, h, tokens)
    layer = KronALayer(base)
    layer.update_layer("default", shapes.a1, shapes.a2)
    merged = costs.merging_pays(shapes, tokens)
    assume(not merged or NEW_TORCH)  # before 2.9 it copied more
    predicted, counted = costs.krona_step(shapes, tokens, merged=merged), counted_step(layer, d, h, tokens)
    assert predicted.multiply_adds == counted.multiply_adds
    assert counted.elements - predicted.elements in (0, 2 * shapes.b1 * shapes.b2)  # B is copied where it is narrow


@few
@given(legal_layers(40), st.integers(1, 200))
def test_merging_pays_where_it_saves_more_than_writing_the_sum_twice_to_new_memory(shapes, tokens):
    apart, merged = (costs.krona_step(shapes, tokens, merged=merged).time(costs.BALANCE) for merged in (False, True))
    assert costs.merging_pays(shapes, tokens) == (apart - merged > 2 * costs.BALANCE * shapes.d * shapes.h)


def test_merging_pays_for_many_tokens_and_small_layers_only():
    def pays(width: int, tokens: int) -> bool:
        return costs.merging_pays(factor_shapes(width, width, 4, 64), tokens)

    assert pays(640, 4096)
    assert not pays(640, 77)
    assert not pays(4096, 10**6)


@few
@given(d=st.integers(2, 40), h=st.integers(2, 40), r=st.integers(1, 6), tokens=st.integers(2, 9), factor=lokr_factors)
def test_a_step_with_pefts_adapters_takes_what_is_counted(d, h, r, tokens, factor):
    lora = adapted_by_peft(LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"]), d, h, "cpu")
    assert costs.lora_step(d, h, r, tokens) == counted_step(lora, d, h, tokens)
    assume(min(factors.lokr_shapes(d, h, factor)) > 1)  # autograd leaves sums over one entry out
    lokr = adapted_by_peft(LoKrConfig(r=r, decompose_factor=factor, target_modules=["0"]), d, h, "cpu")
    assert costs.lokr_step(d, h, r, factor, tokens) == counted_step(lokr, d, h, tokens)


def test_time_weighs_moved_elements_against_multiply_adds():
    assert StepCost(multiply_adds=100, elements=10).time(balance=30) == 400
