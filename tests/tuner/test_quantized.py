"""Adapters on quantized bases: training, merging where the format can be written back, and refusals."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusekrona import KronAConfig, inject_krona, merge_krona, unload_krona, unmerge_krona
from diffusekrona.errors import MergeError
from diffusekrona.tuner.compat import dequantize_bnb_weight
from diffusekrona.tuner.injected import krona_layers
from diffusekrona.tuner.quantized import _widened, quantized_linear

D, H = 64, 128


def plain() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(H, D)


def bnb_4bit(**settings: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(H, D, compute_dtype=torch.float32, quant_type="nf4", **settings)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu")


def bnb_8bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(H, D, has_fp16_weights=False)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu")


def torchao_int8(granularity: str = "PerRow") -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(plain())
    config = torchao.Int8WeightOnlyConfig(granularity=getattr(torchao, granularity)(), version=2)
    torchao.quantize_(model, config)
    return model[0]


def torchao_dynamic() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(plain())
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(version=2))
    return model[0]


def quanto(weights: str = "qint8") -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(plain())
    library.quantize(model, weights=getattr(library, weights))
    library.freeze(model)
    return model[0]


FORMATS: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes 4-bit": bnb_4bit,
    "bitsandbytes 4-bit, double": lambda: bnb_4bit(compress_statistics=True),
    "bitsandbytes 8-bit": bnb_8bit,
    "torchao int8": torchao_int8,
    "torchao int8, one scale": lambda: torchao_int8("PerTensor"),
    "quanto int8": quanto,
    "quanto int4": lambda: quanto("qint4"),
    "quanto float8": lambda: quanto("qfloat8"),
}
every_format = pytest.mark.parametrize("build", FORMATS.values(), ids=FORMATS.keys())
# How far a quantized weight is from its numbers, in units of the largest: a code's half width, and some.
COARSE = {"bitsandbytes 4-bit": 0.16, "bitsandbytes 4-bit, double": 0.16, "quanto int4": 0.12, "quanto float8": 0.05}


def adapted(build: Callable[[], nn.Module], scale: float = 3.0, **fields: Any) -> nn.Sequential:
    model = nn.Sequential(build())
    torch.manual_seed(2)
    inject_krona(model, KronAConfig(a1=4, a2=8, target_modules=["0"], init_b="normal", alpha=scale, **fields))
    return model


def stored(model: nn.Module) -> list[Tensor]:
    """The tensors that hold a quantized weight, and what its layer keeps beside it."""
    base: Any = krona_layers(model)["0"].get_base_layer() if krona_layers(model) else model[0]
    weight = base.weight
    parts = [
        getattr(weight, name, None) for name in ("data", "qdata", "scale", "_data", "_scale", "_shift", "SCB", "CB")
    ]
    parts += [getattr(getattr(base, "state", None), name, None) for name in ("CB", "SCB")]
    parts += [getattr(getattr(weight, "quant_state", None), "absmax", None)]
    return [part.detach().clone() for part in parts if type(part) is Tensor]


def x() -> Tensor:
    return torch.randn(7, H, generator=torch.Generator().manual_seed(0))


def torchao_float8(granularity: str = "PerRow", dtype: torch.dtype = torch.float32) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(plain()).to(dtype)
    config = torchao.Float8WeightOnlyConfig()
    if granularity != "PerRow":
        config = torchao.Float8WeightOnlyConfig(granularity=getattr(torchao, granularity)())
    torchao.quantize_(model, config)
    return model[0]


FUSED = {
    "nf4": bnb_4bit,
    "nf4, double": lambda: bnb_4bit(compress_statistics=True),
    "int8": torchao_int8,
    "int8, one scale": lambda: torchao_int8("PerTensor"),
    "float8": torchao_float8,
    "float8 of bfloat16": lambda: torchao_float8(dtype=torch.bfloat16),
}
every_fused = pytest.mark.parametrize("build", FUSED.values(), ids=FUSED.keys())


@every_fused
@pytest.mark.parametrize("half", [False, True])
def test_a_layer_that_is_read_fast_has_the_bits_that_its_library_reads(build, half):
    base = build().requires_grad_(False)
    found = quantized_linear(base)
    weight = base.weight
    library = dequantize_bnb_weight(weight, None) if hasattr(weight, "quant_state") else weight.dequantize()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(found.weight(dtype), library.to(dtype))
    given = x().to(base.weight.dtype if base.weight.is_floating_point() else torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert torch.equal(found(given), base(given))


def test_an_8_bit_float_that_is_no_number_stays_none():
    codes = torch.arange(256, dtype=torch.uint8)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        torch.testing.assert_close(_widened(codes.view(kind)), codes.view(kind).float(), rtol=0, atol=0, equal_nan=True)


@every_fused
@pytest.mark.parametrize("half", [False, True])
def test_the_fused_step_over_a_quantized_layer_is_the_one_of_its_own_call(build, half, monkeypatch):
    dtype = torch.bfloat16 if half or build is FUSED["float8 of bfloat16"] else torch.float32
    target = torch.randn(7, D, generator=torch.Generator().manual_seed(3))

    def step():
        model = adapted(build, num_terms=2)
        given = x().to(torch.float32 if half else dtype).requires_grad_()
        kept = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t)
        with keep, torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = model(given)
        y.backward(target.to(y.dtype))
        layer = krona_layers(model)["0"]
        own = {p.untyped_storage().data_ptr() for p in (*layer.krona_A.values(), *layer.krona_B.values(), given)}
        others = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
        return [y, given.grad, layer.krona_A["default"].grad, layer.krona_B["default"].grad], others

    ours, others = step()
    assert sum(tensor.numel() for tensor in others) <= 2 * 4 * (8 + 7 * H // 8)  # the scaled A of each term, and AX
    monkeypatch.setattr("diffusekrona.tuner.layer.quantized_linear", lambda base: None)
    plain_way, kept = step()
    assert sum(tensor.numel() for tensor in kept) > H
    for one, other in zip(ours, plain_way, strict=True):
        assert one.dtype == other.dtype
        close = 0.03 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(one, other, rtol=close, atol=close * float(other.detach().abs().max()))


@pytest.mark.parametrize("build", [bnb_4bit, torchao_int8, torchao_float8])
def test_another_methods_layer_beneath_is_called_and_gets_its_gradients(build, monkeypatch):
    def step():
        torch.manual_seed(4)
        model = nn.Sequential(build())
        lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        inject_adapter_in_model(lora, model, "lora")
        inject_krona(model, KronAConfig(a1=4, a2=8, target_modules=["0"], init_b="normal"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or "krona_" in name)
        given = x().requires_grad_()
        model(given).square().sum().backward()
        return [given.grad, *(p.grad for name, p in model.named_parameters() if p.requires_grad)]

    found = step()
    monkeypatch.setattr("diffusekrona.tuner.layer.quantized_linear", lambda base: None)
    expected = step()
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [torchao_dynamic, bnb_8bit, quanto])
def test_a_layer_that_rounds_its_inputs_or_is_not_read_computes_by_itself(build):
    assert quantized_linear(build()) is None


@every_format
def test_factors_and_the_input_get_the_gradients_of_the_dequantized_layer(build):
    model = adapted(build)
    layer = krona_layers(model)["0"]
    base = build()
    bare = base(x())
    given = x().requires_grad_()
    y = model(given)
    A, B = layer.krona_A["default"], layer.krona_B["default"]
    torch.testing.assert_close(y, bare + x() @ (3 * torch.kron(A, B)).T, rtol=1e-4, atol=1e-4)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(y, [A, B], target, retain_graph=True)
    expected = torch.autograd.grad(x() @ (3 * torch.kron(A, B)).T, [A, B], target)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (gx,) = torch.autograd.grad(y, [given], target)
    numbers = torch.stack([base(row) - base(torch.zeros(H)) for row in torch.eye(H)]).T
    dense = numbers.detach() + 3 * torch.kron(A, B).detach()
    torch.testing.assert_close(gx, target @ dense, rtol=0.05, atol=0.05)


@every_format
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("form", [{}, {"num_terms": 2}, {"layout": "transposed"}], ids=str)
def test_a_merged_layer_computes_the_sum_to_its_formats_precision_and_unmerging_restores_every_bit(
    build, used, form, request
):
    model = adapted(build, **form)
    if used:  # bitsandbytes moves its state at the first call
        model(x())
    unmerged, before = model(x()), stored(model)
    weight = krona_layers(model)["0"].get_base_layer().weight
    bare = build()(x())
    merge_krona(model)
    merged = model(x())
    now = krona_layers(model)["0"].get_base_layer().weight
    assert now is not weight
    assert (type(now), now.requires_grad) == (type(weight), False)
    assert {(t.shape, t.dtype) for t in stored(model)} == {(t.shape, t.dtype) for t in before}
    assert (unmerged - bare).abs().max() > 0.5
    coarse = next((c for label, c in COARSE.items() if label in request.node.callspec.id), 0.02)
    assert (merged - unmerged).norm() < coarse * unmerged.norm()
    unmerge_krona(model)
    assert krona_layers(model)["0"].get_base_layer().weight is weight
    after = stored(model)
    assert len(after) == len(before) > 0
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(after, before, strict=True))
    torch.testing.assert_close(model(x()), unmerged)
    unload_krona(model)
    torch.testing.assert_close(model(x()), bare)


@every_format
@pytest.mark.parametrize("exact", ["copy", False])
def test_a_quantized_weight_comes_back_exactly_whatever_was_asked_for(build, exact):
    model = adapted(build)
    unmerged, before = model(x()), stored(model)
    merge_krona(model)
    expected = model(x())
    unmerge_krona(model)
    merge_krona(model, exact=exact)
    torch.testing.assert_close(model(x()), expected, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*exact=False")
        unmerge_krona(model)
    after = stored(model)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(after, before, strict=True))
    torch.testing.assert_close(model(x()), unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{"quant_type": "fp4"}, {"compress_statistics": True}, {"blocksize": 128}, {"quant_storage": torch.float16}],
)
def test_a_4bit_weight_is_merged_in_the_very_format_that_it_had(settings, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    settings = {
        "quant_type": "nf4",
        "compress_statistics": False,
        "blocksize": 64,
        "quant_storage": torch.uint8,
    } | settings
    layer = bnb_4bit()
    layer.weight = bnb.nn.Params4bit(plain().weight.detach().to(dtype), requires_grad=False, **settings).to("cpu")
    model = adapted(lambda: layer, layout="transposed")
    numbers = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    expected = (numbers + krona_layers(model)["0"].get_delta_weight("default").detach()).to(dtype)
    data, state = bnb.functional.quantize_4bit(expected, **settings)
    merge_krona(model)
    weight = layer.weight
    assert {name: getattr(weight, name) for name in settings} == settings
    assert (weight.quant_state.dtype, weight.requires_grad, weight.dtype) == (dtype, False, settings["quant_storage"])
    found = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(found, bnb.functional.dequantize_4bit(data, state))


@every_format
def test_merging_again_and_with_a_second_adapter_never_adds_up_errors(build):
    model = adapted(build)
    inject_krona(model, KronAConfig(a1=2, a2=2, target_modules=["0"], init_b="normal"), "second")
    for _ in range(3):
        merge_krona(model, ["default"])
        merge_krona(model, ["second"])
        both = model(x())
        unmerge_krona(model, ["default"])
        unmerge_krona(model)
        merge_krona(model, ["default", "second"])
        torch.testing.assert_close(model(x()), both, rtol=1e-4, atol=1e-4)
        unmerge_krona(model)
    torch.testing.assert_close(krona_layers(model)["0"].get_base_layer()(x()), build()(x()))


@every_format
def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing(build):
    model = adapted(build)
    model(x())
    before = stored(model)
    factor = krona_layers(model)["0"].krona_B["default"]
    for value in (float("nan"), float("inf")) + ((1e7,) if build is bnb_8bit else ()):
        factor.data[0, 0] = value
        with pytest.raises(MergeError, match="Nothing was merged"):
            merge_krona(model)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(stored(model), before, strict=True)
    )


def int4_weight_only() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(plain())
    torchao.quantize_(model, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4))
    return model[0]


def test_a_merge_keeps_how_inputs_are_quantized():
    model = adapted(torchao_dynamic)
    base = krona_layers(model)["0"].get_base_layer()
    weight, settings = base.weight, base.weight.act_quant_kwargs
    assert settings is not None
    merge_krona(model)
    assert base.weight is not weight
    assert base.weight.act_quant_kwargs == settings
    unmerge_krona(model)
    assert base.weight is weight


def bnb_16bit() -> nn.Module:
    """As bitsandbytes keeps layers whose weights are quantized anew at each call."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(H, D, has_fp16_weights=True)
    layer.load_state_dict(plain().state_dict())
    return layer


@pytest.mark.parametrize("build", [int4_weight_only, bnb_16bit])
def test_a_format_that_cannot_be_written_back_is_refused_by_its_name(build):
    model = adapted(build)
    before = model(x())
    with pytest.raises(MergeError, match=r"keeps its weight as a \w+ .*cannot be written back.*unquantized"):
        merge_krona(model)
    assert torch.equal(model(x()), before)


def test_a_float8_base_is_refused_by_its_dtype():
    model = adapted(plain)
    layer = krona_layers(model)["0"].get_base_layer()
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(MergeError, match="float8_e4m3fn"):
        merge_krona(model)


@pytest.mark.parametrize("build", [bnb_4bit, bnb_8bit, torchao_int8, quanto])
def test_a_check_leaves_a_merged_weight_alone(build):
    model = adapted(build)
    inject_krona(model, KronAConfig(a1=4, a2=8, target_modules=["0"], init_b="normal"), "second")
    layer = krona_layers(model)["0"]
    layer.merge(adapter_names=["default"])
    base, kept = layer.get_base_layer(), layer.restoration
    merged = base.weight
    layer.check_mergeable(layer.merge_terms(["second"]))
    assert base.weight is merged
    assert layer.restoration is kept


def test_what_is_merged_already_counts_once_when_more_is_checked():
    model = adapted(bnb_8bit, scale=1.0)
    inject_krona(model, KronAConfig(a1=4, a2=8, target_modules=["0"], init_b="normal"), "second")
    layer = krona_layers(model)["0"]
    with torch.no_grad():
        for factor in (layer.krona_A["default"], layer.krona_B["default"]):
            factor.fill_(200)
    layer.merge(adapter_names=["default"])
    # 40,000 is more than half of what fp16 holds, in which this format takes its numbers.
    layer.check_mergeable(layer.merge_terms(["second"]))
