"""The step with other adapters for each part of a batch, against each sample's own dense product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from diffusekrona.kron.batched import Part, kron_linear_each, linear_with_krons
from diffusekrona.kron.fused import linear_with_kron
from diffusekrona.kron.shapes import FactorShapes
from tests.tensors import assert_all_close, laid_out, layouts, outputs_and_gradients, shapes_of_factors

many = settings(deadline=None, max_examples=60)
D, H = 24, 36
SHAPES = [(2, 6), (6, 2), (4, 4), (1, 1), (24, 36)]
"""(a1, a2) of the products, in which either order is the cheaper one."""

numbers_of_products = st.lists(st.integers(0, 2), min_size=1, max_size=4)


def parts_of(counts: list[int], lengths: list[int]) -> tuple[list[Part], int]:
    """Parts with so many products and samples each; the number of products."""
    parts, start, first = [], 0, 0
    for count, length in zip(counts, lengths, strict=True):
        parts.append(Part(start, start + length, range(first, first + count)))
        start, first = start + length, first + count
    return parts, first


def factors_of(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        a1, a2 = SHAPES[(seed + number) % len(SHAPES)]
        for rows, columns in ((a1, a2), (D // a1, H // a2)):
            found.append(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return found


def weight_and_bias(bias: bool = True) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(D, H, generator=generator, dtype=torch.float64)
    return weight, torch.randn(D, generator=generator, dtype=torch.float64) if bias else None


def reference(parts: list[Part], bias: bool):
    weight, offset = weight_and_bias(bias)

    def compute(x: Tensor, *factors: Tensor) -> Tensor:
        outputs = []
        for part in parts:
            rows = x[part.start : part.stop]
            y = functional.linear(rows, weight, offset)
            for number in part.products:
                y = y + rows @ torch.kron(*(f.contiguous() for f in factors[2 * number : 2 * number + 2])).T
            outputs.append(y)
        return torch.cat(outputs)

    return compute


def batched(parts: list[Part], bias: bool):
    weight, offset = weight_and_bias(bias)
    return lambda x, *factors: linear_with_krons(
        x, weight, offset, list(zip(factors[::2], factors[1::2], strict=True)), parts
    )


@many
@given(st.data(), numbers_of_products, st.sampled_from([(), (1,), (5,), (2, 3), (90,)]), st.booleans(), layouts)
def test_each_sample_is_what_it_is_alone(data, counts, inner, bias, layout) -> None:
    lengths = data.draw(st.lists(st.integers(0, 2), min_size=len(counts), max_size=len(counts)))
    seed = data.draw(st.integers(0, 1000))
    parts, products = parts_of(counts, lengths)
    x = torch.randn(sum(lengths), *inner, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tensors = [x, *factors_of(products, seed)]
    gradient, layout = torch.randn(*x.shape[:-1], D, dtype=torch.float64), [layout] * len(tensors)
    found = outputs_and_gradients(laid_out(batched(parts, bias), layout), tensors, gradient)
    assert_all_close(found, outputs_and_gradients(laid_out(reference(parts, bias), layout), tensors, gradient))


@many
@given(shapes_of_factors, st.integers(0, 4), st.sampled_from([(), (1,), (5,), (2, 3)]), st.integers(0, 1000))
def test_a_product_for_each_sample_without_a_loop(
    shapes: FactorShapes, samples: int, inner: tuple[int, ...], seed: int
):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((samples, *inner, shapes.h), (samples, shapes.a1, shapes.a2), (samples, shapes.b1, shapes.b2))
    x, A, B = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)
    expected = [row @ torch.kron(a, b).T for row, a, b in zip(x, A, B, strict=True)]
    found = kron_linear_each(x, A, B)
    assert found.shape == (samples, *inner, shapes.d)
    if expected:
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [2, 90])
def test_gradients_pass_gradcheck_twice_where_an_adapter_has_several_parts(tokens: int) -> None:
    parts = [Part(0, 1, range(1)), Part(1, 2, range(1, 1)), Part(2, 3, range(1, 2)), Part(3, 4, range(1))]
    tensors = [torch.randn(4, tokens, H, dtype=torch.float64), *factors_of(2, 0)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    torch.autograd.gradcheck(batched(parts, True), tensors, fast_mode=True)
    torch.autograd.gradgradcheck(batched(parts, True), tensors, fast_mode=True)


@pytest.mark.parametrize("tokens", [2, 90])
@pytest.mark.parametrize("wanted", [(True, False, True), (False, True, False), (False, False, True)])
def test_only_what_asks_for_a_gradient_gets_one(tokens: int, wanted: tuple[bool, ...]) -> None:
    parts = [Part(0, 1, range(1)), Part(1, 2, range(0, 0))]
    tensors = [torch.randn(2, tokens, H, dtype=torch.float64), *factors_of(1, 0)]
    for tensor, wants in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(wants)
    batched(parts, True)(*tensors).sum().backward()
    assert tuple(tensor.grad is not None for tensor in tensors) == wanted
    whole = [tensor.detach().requires_grad_() for tensor in tensors]
    reference(parts, True)(*whole).sum().backward()
    assert_all_close(
        [t.grad for t in tensors if t.grad is not None],
        [w.grad for w, wants in zip(whole, wanted, strict=True) if wants],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, 90])
def test_one_adapter_for_all_is_the_fused_step_to_the_bit(dtype: torch.dtype, tokens: int) -> None:
    weight, bias = (tensor.to(dtype) for tensor in weight_and_bias())
    pairs = [tuple(f.to(dtype) for f in factors_of(1, 2))]
    x = torch.randn(4, tokens, H).to(dtype)
    with torch.no_grad():
        found = linear_with_krons(x, weight, bias, pairs, [Part(0, 4, range(1))])
        assert torch.equal(found, linear_with_kron(x, weight, bias, pairs))


def test_autocast_computes_in_its_dtype() -> None:
    weight, bias = (tensor.float() for tensor in weight_and_bias())
    factors = [f.float().requires_grad_() for f in factors_of(1, 0)]
    parts = [Part(0, 1, range(1)), Part(1, 2, range(0, 0))]
    x = torch.randn(2, 3, H)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_with_krons(x, weight, bias, [(factors[0], factors[1])], parts)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert factors[0].grad.dtype == torch.float32
    expected = functional.linear(x, weight, bias)
    expected[:1] += x[:1] @ torch.kron(*factors).T
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-1)
