"""SVDiff's layer against the matrix product written out, in float64, for values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from research.methods import SVDiff
from research.methods.svdiff import SpectralLayer

LAYERS = {
    "wide": (lambda: nn.Linear(7, 5), (2, 3, 7)),
    "tall": (lambda: nn.Linear(5, 9, bias=False), (4, 5)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 2, dilation=2), (2, 4, 9)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (1, 6, 5, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 6)),
    "embedding": (lambda: nn.Embedding(9, 4), (2, 3)),
}
EACH = pytest.mark.parametrize("kind", LAYERS)


def made(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make().double().requires_grad_(False)
    if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
        layer.weight.normal_()
    x = torch.randint(9, shape) if kind == "embedding" else torch.randn(shape, dtype=torch.float64)
    return layer, x


def slowly(layer, delta, x):
    """The layer's own formula on U · diag(relu(σ + δ)) · Vᵀ, one singular value after the other."""
    weight = layer.weight
    matrix = weight.reshape(len(weight), -1) if weight.dim() > 1 else weight.reshape(1, -1)
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    total = torch.zeros_like(matrix)
    for i in range(len(sigma)):
        total = total + torch.clamp(sigma[i] + delta[i], min=0) * torch.outer(u[:, i], vh[i])
    shifted = total.reshape(weight.shape)
    if isinstance(layer, nn.Linear):
        return F.linear(x, shifted, layer.bias)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, shifted, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, nn.Conv1d):
        return F.conv1d(x, shifted, layer.bias, layer.stride, layer.padding, layer.dilation)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, shifted, layer.bias, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, shifted, layer.bias, layer.eps)
    return shifted[x]


def with_gradients(compute, x, delta):
    """The result, and the gradients of x, where it has one, and of δ."""
    inputs = [delta] if x.dtype == torch.int64 else [delta, x]
    for one in inputs:
        one.grad = None
        one.requires_grad_(True)
    y = compute(x)
    torch.manual_seed(2)
    (y * torch.randn(y.shape, dtype=y.dtype)).sum().backward()
    return [y.detach(), *(one.grad for one in inputs)]


@EACH
def test_value_and_gradients(kind):
    layer, x = made(kind)
    wrapped = SpectralLayer(layer)
    assert wrapped.delta.dtype == torch.float64
    with torch.no_grad():
        torch.manual_seed(1)
        wrapped.delta.normal_()
        wrapped.delta[-1] = -wrapped.S[-1] - 0.5  # one singular value is cut off at zero
    mine = with_gradients(wrapped, x, wrapped.delta)
    reference = with_gradients(lambda z: slowly(layer, delta, z), x, delta := wrapped.delta.detach().clone())
    for got, expected in zip(mine, reference, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert mine[1][-1] == 0
    assert layer.weight.grad is None


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_without_shift_it_is_the_layer_bit_for_bit(kind, dtype):
    layer, x = made(kind)
    layer = layer.to(dtype)
    x = x if x.dtype == torch.int64 else x.to(dtype)
    wrapped = SpectralLayer(layer)
    assert wrapped.delta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(wrapped(x), layer(x))


@pytest.mark.parametrize("kind", ["wide", "tall", "conv", "conv1d", "grouped", "layer norm"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_no_copy_of_the_weight_is_kept_for_the_backward_pass(kind, autocast):
    layer, x = made(kind)
    wrapped, x = SpectralLayer(layer.float()), x.float().requires_grad_(True)
    held, dtypes = [], []
    real = wrapped._computed_in

    def noted(*args):
        weight = real(*args)
        held.append(weight.untyped_storage()._weak_ref())
        dtypes.append(weight.dtype)
        return weight

    wrapped._computed_in = noted
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = wrapped(x)
    assert [torch.UntypedStorage._expired(one) for one in held] == [True]
    # Where autocast would make its own copy, it has to be made before.
    assert dtypes == [torch.bfloat16 if autocast and kind != "layer norm" else torch.float32]
    y.float().sum().backward()
    assert wrapped.delta.grad is not None


def test_under_autocast():
    torch.manual_seed(0)
    wrapped = SpectralLayer(nn.Linear(16, 8).requires_grad_(False))
    x = torch.randn(4, 16, requires_grad=True)
    with torch.no_grad():
        wrapped.delta.normal_()
    exact = wrapped(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = wrapped(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    first = wrapped.delta.grad.clone(), x.grad.clone()
    wrapped.delta.grad = x.grad = None
    exact.sum().backward()
    torch.testing.assert_close(first, (wrapped.delta.grad, x.grad), rtol=0.05, atol=0.05)


def test_under_gradient_checkpointing():
    layer, x = made("conv")
    wrapped = SpectralLayer(layer)
    plain = with_gradients(wrapped, x, wrapped.delta)
    again = with_gradients(
        lambda z: torch.utils.checkpoint.checkpoint(wrapped, z, use_reentrant=False), x, wrapped.delta
    )
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_models_find_what_they_ask_a_layer_for():
    wrapped = SpectralLayer(nn.Conv2d(3, 8, 3))
    assert wrapped.in_channels == 3
    assert wrapped.weight is wrapped.base_layer.weight
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wrapped.nonsense


def test_a_layer_that_is_in_two_places_is_shifted_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 2)})
    model["c"] = model["a"]
    parameters = SVDiff().prepare(model)
    assert list(parameters) == ["a.delta", "b.delta"]
    assert model["a"] is model["c"]
    SVDiff().remove(model)
    assert model["a"] is model["c"]
    assert isinstance(model["a"], nn.Linear)


def test_a_weight_without_singular_values_is_named():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 2)})
    with torch.no_grad():
        model["b"].weight[0] = torch.nan
    with pytest.raises(ValueError, match="b holds an infinity or a NaN"):
        SVDiff().prepare(model)
    assert isinstance(model["a"], nn.Linear)
    assert model["a"].weight.requires_grad
