"""KronAConv2d: against the dense convolution, over kernels, strides, padding, dilation and memory formats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from diffusekrona import KronAConfig, inject_krona, krona_report, load_krona, merge_krona, save_krona, unmerge_krona
from diffusekrona.errors import FactorShapeError
from diffusekrona.kron.costs import cheapest_conv_order
from diffusekrona.kron.products import kron_conv2d
from diffusekrona.kron.shapes import FactorShapes
from diffusekrona.tuner.layer import KronAConv2d
from tests.tensors import LargestTensor

sides = st.sampled_from([1, 2, 3, 5])


def dense(A: Tensor, B: Tensor) -> Tensor:
    """A ⊗ B as a convolution's weight, from the definition."""
    (a1, a2), (b1, b2, *kernel) = A.shape, B.shape
    return torch.einsum("ij,klpq->ikjlpq", A, B).reshape(a1 * b1, a2 * b2, *kernel)


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.tuples(sides, sides, sides, sides),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2) | st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.integers(0, 2) | st.tuples(st.integers(0, 1), st.integers(0, 2)) | st.just("valid"),
    dilation=st.integers(1, 2),
    batch=st.sampled_from([None, 0, 1, 3]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_values_and_gradients_are_those_of_the_dense_convolution(
    sizes, kernel, stride, padding, dilation, batch, memory_format
):
    a1, a2, b1, b2 = sizes
    A, B = torch.randn(a1, a2, dtype=torch.float64), torch.randn(b1, b2, *kernel, dtype=torch.float64)
    x = torch.randn(batch or 1, a2 * b2, 7, 6, dtype=torch.float64).to(memory_format=memory_format)
    x = x[0] if batch is None else x[:batch]
    results = []
    for function in (
        lambda x, A, B: kron_conv2d(x, A, B, stride, padding, dilation),
        lambda x, A, B: functional.conv2d(x, dense(A, B), None, stride, padding, dilation),
    ):
        leaves = [t.detach().requires_grad_() for t in (x, A, B)]
        y = function(*leaves)
        weights = torch.arange(y.numel(), dtype=torch.float64).view(y.shape).cos()
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("shapes", "order"), [((2, 16, 16, 2), "A first"), ((16, 2, 2, 16), "B first")])
def test_the_cheaper_order_is_taken_and_never_the_dense_weight(shapes, order):
    a1, a2, b1, b2 = shapes
    assert cheapest_conv_order(FactorShapes(*shapes), 9) == order
    with LargestTensor() as largest:
        kron_conv2d(torch.randn(1, a2 * b2, 1, 1), torch.randn(a1, a2), torch.randn(b1, b2, 3, 3), padding=1)
    assert largest.elements < a1 * a2 * b1 * b2 * 9


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(8, 8, 1, bias=False)
        self.proj = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv2(self.conv1(x).relu()).mean((-1, -2)))


forms = pytest.mark.parametrize("form", [{}, {"num_terms": 2}, {"b_rank": 1}, {"num_terms": 2, "b_rank": 1}], ids=str)
memory_formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def adapted(**fields) -> Net:
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    inject_krona(net, KronAConfig(a1=2, a2=2, target_modules=["conv1", "conv2", "proj"], init_b="normal", **fields))
    return net


@forms
@memory_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_convolutions_compute_the_same_and_unmerging_restores_every_bit(form, memory_format, dtype):
    net = adapted(alpha=0.3, **form).to(dtype).to(memory_format=memory_format)
    assert isinstance(net.conv1, KronAConv2d)
    x = torch.randn(2, 4, 8, 8).to(dtype)
    before, unmerged = net.conv1.weight.clone(memory_format=torch.preserve_format), net(x)
    merge_krona(net)
    assert not torch.equal(net.conv1.weight, before)
    update = net.conv1.get_delta_weight("default").float()
    torch.testing.assert_close(net.conv1.weight, (before.float() + update).to(dtype), rtol=0.01, atol=1e-3)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(net(x), unmerged, rtol=tolerance, atol=tolerance)
    unmerge_krona(net)
    assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (net.conv1.weight, before)))
    assert net.conv1.weight.stride() == before.stride()


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": (2, 1), "padding": (0, 2)},
        {"padding": (2, 1), "dilation": (2, 1)},
        {"padding": "same"},
        {"padding": (2, 1), "dilation": (2, 1), "stride": (1, 2), "padding_mode": "circular"},
        {"padding": (1, 0), "padding_mode": "replicate"},
        {"padding": "same", "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_an_adapted_convolution_is_one_with_the_dense_update_whatever_its_settings(settings):
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 8, (3, 1), **settings)}).double()
    inject_krona(net, KronAConfig(a1=2, a2=2, target_modules=["conv"], init_b="normal", alpha=0.7))
    net.double()
    layer, x = net["conv"], torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expected = nn.Conv2d(4, 8, (3, 1), **settings).double()
    A, B = layer.krona_A["default"], layer.krona_B["default"]
    expected.load_state_dict(layer.get_base_layer().state_dict())
    expected.weight.data += 0.7 * dense(A, B.view(4, 2, 3, 1)).detach()
    torch.testing.assert_close(layer(x), expected(x))


@forms
def test_convolutions_are_saved_and_loaded_bit_for_bit(form, tmp_path):
    net = adapted(**form).requires_grad_(False)  # on some processors a convolution's bits depend on that
    x = torch.randn(2, 4, 8, 8)
    expected = net(x)
    saved = save_krona(net, tmp_path / "adapter.safetensors")
    other = Net()
    other.load_state_dict(
        {key.replace(".base_layer", ""): t for key, t in net.state_dict().items() if "krona" not in key}
    )
    load_krona(other, saved)
    assert torch.equal(other(x), expected)
    report = krona_report(other)
    assert report.parameters == sum(p.numel() for name, p in other.named_parameters() if "krona" in name)
    assert [layer.size for layer in report.layers] == [(8, 36), (8, 8), (4, 8)]
    assert "8 × 4 × 3 × 3" in report.table().columns[1]._cells


def test_only_the_factors_get_gradients_and_they_learn():
    net = adapted()
    net(torch.randn(2, 4, 8, 8)).square().sum().backward()
    trained = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert all("krona" in name for name in trained)
    assert bool(trained["conv1.krona_B.default"].any())


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), {}, "2 groups"),
        (nn.Conv2d(4, 4, 3), {"a1": 3}, "a1=3"),
        (nn.Conv2d(4, 4, 3), {"layout": "transposed"}, "layout 'transposed' is for linear layers"),
    ],
)
def test_what_cannot_be_adapted_is_an_error_that_names_the_layer(module, fields, message):
    net = nn.ModuleDict({"conv": module})
    with pytest.raises(FactorShapeError, match=rf"conv: .*{message}"):
        inject_krona(net, KronAConfig(**{"a1": 2, "a2": 2, "target_modules": ["conv"], **fields}))
    assert net["conv"] is module
