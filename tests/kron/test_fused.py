"""The fused step against the base's output plus `x @ torch.kron(A, B).T`, and against what it may cost."""

import contextlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.methods import METHODS
from diffusekrona import KronALayer
from diffusekrona.kron.costs import cheapest_order, krona_multiply_adds
from diffusekrona.kron.fused import linear_with_kron
from diffusekrona.kron.shapes import FactorShapes
from tests.tensors import (
    LargestTensor,
    assert_all_close,
    assert_only_wanted_gradients,
    laid_out,
    layouts,
    leading,
    outputs_and_gradients,
    random_inputs,
    shapes_of_factors,
)

many = settings(deadline=None, max_examples=80)
tokens = leading | st.just((2, 80))  # so many that merging pays
A_FIRST, B_FIRST = FactorShapes(2, 6, 5, 3), FactorShapes(6, 2, 3, 5)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
    y = functional.linear(x, weight, bias)
    for A, B in zip(factors[::2], factors[1::2], strict=True):
        y = y + x @ torch.kron(A.contiguous(), B.contiguous()).T
    return y


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
    return linear_with_kron(x, weight, bias, list(zip(factors[::2], factors[1::2], strict=True)))


def frozen(function, shapes: FactorShapes, bias: bool, dtype=torch.float64):
    """The function of x and the factors, for one random weight."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(shapes.d, shapes.h, generator=generator, dtype=torch.float64).to(dtype)
    offset = torch.randn(shapes.d, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return lambda x, *factors: function(x, weight, offset, *factors)


@many
@given(
    shapes=shapes_of_factors,
    lead=tokens,
    bias=st.booleans(),
    second=st.booleans(),
    layout=st.tuples(layouts, layouts, layouts),
    seed=st.integers(0, 2**31),
)
def test_value_and_every_gradient_equal_the_dense_product_in_any_layout(shapes, lead, bias, second, layout, seed):
    inputs, output_gradient = random_inputs(shapes, lead, seed)
    # A second adapter of the same layer, with its sides the other way round where that fits.
    other = FactorShapes(shapes.b1, shapes.b2, shapes.a1, shapes.a2) if second else None
    if other:
        inputs += random_inputs(other, lead, seed + 1)[0][1:]
    layout = (layout[0], *[lay for _ in inputs[1::2] for lay in layout[1:3]])
    found = outputs_and_gradients(laid_out(frozen(fused, shapes, bias), layout), inputs, output_gradient)
    expected = outputs_and_gradients(laid_out(frozen(reference, shapes, bias), layout), inputs, output_gradient)
    assert found[0].shape == (*lead, shapes.d)
    assert_all_close(found, expected)


@many
@given(shapes=shapes_of_factors, lead=tokens, layout=layouts, seed=st.integers(0, 2**31))
def test_an_output_gradient_of_any_layout_is_taken(shapes, lead, layout, seed):
    inputs, output_gradient = random_inputs(shapes, lead, seed)
    found = outputs_and_gradients(frozen(fused, shapes, False), inputs, layout(output_gradient))
    expected = outputs_and_gradients(frozen(reference, shapes, False), inputs, layout(output_gradient))
    assert_all_close(found, expected)


@many
@given(shapes=shapes_of_factors, lead=tokens, seed=st.integers(0, 2**31))
@pytest.mark.parametrize("factor_dtype", ["x's", torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_stays_within_the_bound_of_the_dtype(dtype, factor_dtype, shapes, lead, seed):
    factor_dtype = dtype if factor_dtype == "x's" else factor_dtype
    (x, *factors), output_gradient = random_inputs(shapes, lead, seed, dtype)
    inputs = [x, *(factor.to(factor_dtype) for factor in factors)]
    found = outputs_and_gradients(frozen(fused, shapes, True, dtype), inputs, output_gradient)

    def exactly(change):
        rounded = frozen(
            lambda x, w, b, *f: reference(x, *(change(t.to(dtype).double()) for t in (w, b)), *f), shapes, True
        )
        return outputs_and_gradients(rounded, [change(t.double()) for t in inputs], change(output_gradient.double()))

    # All are sums of products, so with absolute values they bound what rounding each term can do.
    exact, largest = exactly(lambda t: t), exactly(torch.abs)
    tokens = max(1, output_gradient.numel() // shapes.d)
    steps = sum(shapes) + shapes.d + shapes.h + tokens * max(shapes) + 4
    for ours, theirs, bound, leaf in zip(found, exact, largest, (x, *inputs), strict=True):
        assert ours.dtype == leaf.dtype
        error = (ours.double() - theirs).abs()
        assert bool((error <= steps * (torch.finfo(dtype).eps * bound + torch.finfo(dtype).tiny)).all())


@pytest.mark.parametrize("shapes", [A_FIRST, B_FIRST])
@pytest.mark.parametrize("tokens", [2, 24])
def test_gradients_pass_gradcheck_twice(shapes, tokens):
    inputs, _ = random_inputs(shapes, (tokens,), seed=0)
    leaves = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(frozen(fused, shapes, True), leaves)
    assert torch.autograd.gradgradcheck(frozen(fused, shapes, True), leaves)


@pytest.mark.parametrize("shapes", [A_FIRST, B_FIRST])
@pytest.mark.parametrize("tokens", [4, 80])
@pytest.mark.parametrize("wanted", [(i & 1, i & 2, i & 4) for i in range(8)])
def test_only_the_inputs_that_ask_for_a_gradient_get_one(shapes, tokens, wanted):
    inputs, output_gradient = random_inputs(shapes, (tokens,), seed=1)
    expected = outputs_and_gradients(frozen(reference, shapes, False), inputs, output_gradient)[1:]
    assert_only_wanted_gradients(frozen(fused, shapes, False), inputs, output_gradient, wanted, expected)


@pytest.mark.parametrize(
    ("wanted", "a_first", "b_first"),
    [("xAB", 5, 5), ("AB", 5, 5), ("xA", 3, 4), ("xB", 4, 3), ("x", 2, 2), ("A", 3, 3), ("B", 3, 3)],
)
@pytest.mark.parametrize("shapes", [FactorShapes(4, 4, 4, 4), FactorShapes(4, 2, 2, 4)])
def test_no_product_is_computed_that_nobody_asks_for(shapes, wanted, a_first, b_first):
    """With these shapes both products of an adapter cost alike. The counter misses those that add in place."""
    (x, A, B), output_gradient = random_inputs(shapes, (2,), seed=1)
    for tensor, name in ((x, "x"), (A, "A"), (B, "B")):
        tensor.requires_grad_(name in wanted)
    with FlopCounterMode(display=False) as counter:
        frozen(fused, shapes, False)(x, A, B).backward(output_gradient)
    base = 2 * shapes.d * shapes.h * (2 if "x" in wanted else 1)
    order = cheapest_order(shapes)
    half = krona_multiply_adds(shapes, order, tokens=2) // 2
    assert counter.get_total_flops() == 2 * (base + half * (a_first if order == "A first" else b_first))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_leaves_dtypes(x_dtype, factor_dtype):
    shapes = FactorShapes(4, 3, 2, 5)
    (x, A, B), output_gradient = random_inputs(shapes, (6,), seed=2)
    leaves = [t.to(d).requires_grad_() for t, d in ((x, x_dtype), (A, factor_dtype), (B, factor_dtype))]
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen(fused, shapes, True, torch.float32)(*leaves)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, leaves, output_gradient.bfloat16())
    expected = outputs_and_gradients(frozen(reference, shapes, True), [x, A, B], output_gradient)
    for ours, theirs, leaf in zip((y, *gradients), expected, (y, *leaves), strict=True):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))


@pytest.mark.parametrize("shapes", [FactorShapes(8, 8, 8, 8), FactorShapes(4, 16, 16, 4), FactorShapes(16, 2, 4, 32)])
def test_neither_direction_ever_builds_the_dense_product(shapes):
    inputs, output_gradient = random_inputs(shapes, (3,), seed=6)
    weight = torch.zeros(shapes.d, shapes.h, dtype=torch.float64)
    with LargestTensor(apart_from=weight) as largest:
        outputs_and_gradients(lambda x, A, B: fused(x, weight, None, A, B), inputs, output_gradient)
    assert 0 < largest.elements < shapes.d * shapes.h


class Launches(TorchDispatchMode):
    """Counts the operations that compute or copy something: what a GPU launches a kernel for."""

    FREE = ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "detach", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.overloadpacket.__name__ in self.FREE)
        return func(*args, **(kwargs or {}))


def launches(method: str, dtype: torch.dtype, d: int, h: int) -> int:
    """Of a step, forward and backward, of a layer of this dtype with factors in fp32."""
    layer = METHODS[method](nn.Linear(h, d, bias=False, dtype=dtype).requires_grad_(False))
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    x, gy = torch.randn(2, 32, h, dtype=dtype, requires_grad=True), torch.randn(2, 32, d, dtype=dtype)
    with Launches() as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x)
        y.backward(gy)
    assert x.grad is not None
    return counted.count


@pytest.mark.parametrize("method", ["KronA (4, 64)", "KronA (8, 8)"])
@pytest.mark.parametrize(("d", "h"), [(1280, 1280), (640, 2048)])
def test_a_step_launches_no_more_operations_than_loras(method, d, h):
    lora = {dtype: launches("PEFT LoRA r=4", dtype, d, h) for dtype in (torch.float32, torch.bfloat16)}
    assert lora == {torch.float32: 12, torch.bfloat16: 20}
    assert launches(method, torch.float32, d, h) <= 12
    assert launches(method, torch.bfloat16, d, h) <= 14


def merges(dtype: torch.dtype = torch.float32, tokens: int = 100) -> bool:
    """Whether a sum as large as the weight is made for an output of so many tokens."""
    shapes = FactorShapes(4, 4, 8, 8)
    inputs, _ = random_inputs(shapes, (tokens,), seed=6, dtype=dtype)
    weight = torch.zeros(shapes.d, shapes.h, dtype=dtype)
    made: list[torch.Size] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.append(result.shape)
            return result

    with Sizes():
        fused(inputs[0], weight, None, *inputs[1:])
    return torch.Size([4, 8, 4, 8]) in made


def test_the_weight_and_its_update_are_summed_only_for_many_tokens_in_full_precision():
    assert merges()
    assert merges(torch.float64)
    assert not merges(tokens=3)
    assert not merges(torch.bfloat16)


since_torch_2_9 = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch has this setting since 2.9"
)


@pytest.mark.parametrize(
    "setting",
    [
        "pass",
        "torch.set_float32_matmul_precision('high')",
        pytest.param("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", marks=since_torch_2_9),
        pytest.param("torch.backends.cuda.matmul.fp32_precision = 'tf32'", marks=since_torch_2_9),
    ],
)
def test_nothing_is_summed_where_and_only_where_a_cpu_may_multiply_in_less_than_full_precision(setting):
    program = f"import torch; from tests.kron.test_fused import merges; {setting}; print(merges())"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == ("True\n" if setting == "pass" or "cuda" in setting else "False\n")


def saved_for_backward(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors that a module's output keeps for its backward pass, the module's parameters left out."""
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return list(kept.values())


def krona_layer(shapes: FactorShapes = A_FIRST, bias: bool = True, **options) -> KronALayer:
    torch.manual_seed(0)
    layer = KronALayer(nn.Linear(shapes.h, shapes.d, bias=bias).requires_grad_(False))
    layer.update_layer("default", shapes.a1, shapes.a2, init_b="normal", **options)
    return layer


def ran_fused(y: Tensor) -> bool:
    """Whether y came out of the fused step."""
    return type(y.grad_fn).__name__ == "LinearWithKronBackward"


@pytest.mark.parametrize("shapes", [A_FIRST, B_FIRST])
@pytest.mark.parametrize("tokens", [7, 80])
def test_a_layer_keeps_its_input_alone(shapes, tokens):
    x = torch.randn(tokens, shapes.h, requires_grad=True)
    layer = krona_layer(shapes)
    assert [t.data_ptr() for t in saved_for_backward(layer, x)] == [x.data_ptr()]
    layer.krona_A.requires_grad_(False)
    layer.krona_B.requires_grad_(False)
    assert saved_for_backward(layer, x) == []


def test_a_plain_frozen_linear_layer_is_fused():
    y = krona_layer()(torch.randn(3, A_FIRST.h))
    assert ran_fused(y)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled_by_subclass(base: nn.Linear) -> None:
    base.__class__ = Doubling


def doubled_by_hook(base: nn.Linear) -> None:
    base.register_forward_hook(lambda module, inputs, output: 2 * output)


def doubled_by_pre_hook(base: nn.Linear) -> None:
    base.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def doubled_by_new_forward(base: nn.Linear) -> None:
    plain = base.forward
    base.forward = lambda x: 2 * plain(x)


def doubled_by_parametrization(base: nn.Linear) -> None:
    nn.utils.parametrize.register_parametrization(base, "weight", Double())
    base.requires_grad_(False)


@pytest.mark.parametrize(
    "double",
    [doubled_by_subclass, doubled_by_hook, doubled_by_pre_hook, doubled_by_new_forward, doubled_by_parametrization],
)
def test_a_base_layer_that_does_more_than_a_plain_one_is_called(double):
    x, layer = torch.randn(3, A_FIRST.h), krona_layer(bias=False)
    expected = 2 * layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    double(layer.base_layer)
    y = layer(x)
    assert not ran_fused(y)
    torch.testing.assert_close(y, expected)


def test_hooks_that_look_at_gradients_and_hooks_on_all_modules_see_the_base_layer():
    x, layer, seen = torch.randn(3, A_FIRST.h, requires_grad=True), krona_layer(), []
    handle = layer.base_layer.register_full_backward_hook(lambda module, gx, gy: seen.append("backward"))
    layer(x).sum().backward()
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, y: seen.append(type(module).__name__)
    )
    layer(x)
    handle.remove()
    assert seen == ["backward", "Linear", "KronALayer"]
    assert ran_fused(layer(x))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_base_layer_in_training_gets_its_gradients(part):
    layer = krona_layer()
    getattr(layer.base_layer, part).requires_grad_()
    layer(torch.randn(3, A_FIRST.h)).square().sum().backward()
    assert getattr(layer.base_layer, part).grad is not None


@pytest.mark.parametrize("shapes", [FactorShapes(2, 4, 12, 6), FactorShapes(8, 8, 16, 16), FactorShapes(4, 2, 6, 12)])
@pytest.mark.parametrize("tokens", [7, 200])
def test_what_asks_for_a_gradient_does_not_change_a_bit_of_the_output(shapes, tokens):
    layer, x = krona_layer(shapes), torch.randn(2, tokens, shapes.h)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer(x), expected)
    layer.requires_grad_(False)
    assert torch.equal(layer(x), expected)
    layer.requires_grad_(True)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


def test_dropout_takes_the_other_path_in_training_only():
    layer, x = krona_layer(dropout=0.5), torch.randn(64, A_FIRST.h)
    assert not ran_fused(layer(x))
    assert ran_fused(layer.eval()(x))


def test_arguments_for_the_base_layer_take_the_other_path():
    layer = krona_layer()
    layer.base_layer.__class__ = type(
        "Scaled", (nn.Linear,), {"forward": lambda self, x, k: k * nn.Linear.forward(self, x)}
    )
    x = torch.randn(3, A_FIRST.h)
    torch.testing.assert_close(layer(x, 0.0), x @ layer.get_delta_weight("default").T)
    with pytest.raises(TypeError):
        krona_layer()(x, 0.0)


def test_several_active_adapters_are_one_step():
    layer, x = krona_layer(), torch.randn(3, A_FIRST.h)
    layer.update_layer("other", 5, 2, init_b="normal", alpha=0.5)
    layer.set_adapter(["default", "other"])
    y = layer(x)
    assert ran_fused(y)
    expected = layer.base_layer(x) + sum(x @ layer.get_delta_weight(name).T for name in ("default", "other"))
    torch.testing.assert_close(y, expected)


def test_the_output_may_be_changed_in_place():
    layer, x = krona_layer(), torch.randn(3, A_FIRST.h)
    y = layer(x)
    y += 1
    y.relu_()
    y.sum().backward()
    twin = krona_layer()
    (twin.base_layer(x) + x @ twin.get_delta_weight("default").T + 1).relu().sum().backward()
    torch.testing.assert_close(layer.krona_A["default"].grad, twin.krona_A["default"].grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    x, gradients = torch.randn(3, A_FIRST.h), []
    for run in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        layer, leaf = krona_layer(), x.clone().requires_grad_()
        run(layer, leaf).square().sum().backward()
        gradients.append([leaf.grad, layer.krona_A["default"].grad, layer.krona_B["default"].grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_torch_func_and_forward_mode_take_the_other_path_and_agree():
    layer, x = krona_layer(), torch.randn(3, A_FIRST.h)
    A = layer.krona_A["default"].detach()

    def loss(A, x):
        return torch.func.functional_call(layer, {"krona_A.default": A}, (x,)).square().sum()

    expected = torch.autograd.grad(loss(A.clone().requires_grad_(), x), layer.krona_B["default"])
    layer(x).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(A, x), layer.krona_A["default"].grad)
    torch.testing.assert_close(layer.krona_B["default"].grad, *expected)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(A, x[:, None])
    torch.testing.assert_close(each.sum(0), layer.krona_A["default"].grad)
    direction = torch.randn_like(A)
    _, along = torch.func.jvp(lambda A: loss(A, x), (A,), (direction,))
    torch.testing.assert_close(along, (layer.krona_A["default"].grad * direction).sum())
    with forward_ad.dual_level():
        dual = torch.func.functional_call(layer, {"krona_A.default": forward_ad.make_dual(A, direction)}, (x,))
        torch.testing.assert_close(forward_ad.unpack_dual(dual.square().sum()).tangent, along)


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_compiled_without_a_break_and_without_a_second_compilation_for_new_weights(context):
    torch._dynamo.reset()
    layer, x = krona_layer(), torch.randn(3, A_FIRST.h)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with context(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(x), layer(x))
            with torch.no_grad():
                layer.krona_A["default"].add_(1)
                layer.base_layer.weight.mul_(0.5)
    if context is contextlib.nullcontext:
        compiled(x).sum().backward()
        found, layer.krona_A["default"].grad = layer.krona_A["default"].grad, None
        layer(x).sum().backward()
        torch.testing.assert_close(found, layer.krona_A["default"].grad)
