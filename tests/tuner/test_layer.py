"""KronALayer: the forward pass, PEFT's switches beside PEFT's own LoRA, exact merging, starting factors."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diffusekrona import KronAConfig, KronALayer
from diffusekrona.errors import FactorShapeError, MergeError
from diffusekrona.tuner.layer import can_fuse, layer_size

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
D, H = 12, 20
FACTORS = {"a": (3, 4), "b": (2, 10), "c": (12, 1)}

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = INTEGERS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def krona_layer(*names: str, dtype: torch.dtype = torch.float64, d: int = D, h: int = H, **kwargs) -> KronALayer:
    """A layer with random adapters of those names, all active; factors in fp32, or fp64 on an fp64 base."""
    layer = KronALayer(nn.Linear(h, d, dtype=dtype).requires_grad_(False))
    for name in names:
        layer.update_layer(name, *FACTORS[name], init_b="normal", **kwargs)
    if dtype == torch.float64:
        layer.double()
    layer.set_adapter(list(names))
    return layer


def weight_of(layer: KronALayer) -> Tensor:
    return layer.get_base_layer().weight


def dense(layer: KronALayer, *names: str) -> Tensor:
    """Σ s · A ⊗ B in float64."""
    deltas = [torch.kron(layer.krona_A[n].double(), layer.krona_B[n].double()) * layer.scaling[n] for n in names]
    return sum(deltas, torch.zeros(D, H, dtype=torch.float64)).detach()


def expected_output(layer: KronALayer, x: Tensor, *names: str) -> Tensor:
    base = layer.get_base_layer()
    return functional.linear(x.double(), base.weight.double() + dense(layer, *names), base.bias.double())


def quietly(call, *args, **kwargs):
    """PEFT warns where an adapter is merged twice or an active one is deleted; here that is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*args, **kwargs)


class TestForward:
    @pytest.mark.parametrize("names", [(), ("a",), ("b",), ("a", "b"), ("a", "b", "c")])
    @pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
    def test_adds_every_active_update_with_its_own_weight(self, names, lead):
        layer = krona_layer(*names)
        for i, name in enumerate(names):
            layer.set_scale(name, 0.5 + i)
        x = torch.randn(*lead, H, dtype=torch.float64)
        torch.testing.assert_close(layer(x), expected_output(layer, x, *names), rtol=1e-12, atol=1e-12)

    def test_gradients_of_input_and_factors_are_those_of_the_dense_layer(self):
        layer = krona_layer("a", "b", alpha=0.7)
        x = torch.randn(4, H, dtype=torch.float64, requires_grad=True)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        assert len(leaves) == 5
        target = torch.randn(4, D, dtype=torch.float64)
        found = torch.autograd.grad(layer(x), leaves, target)
        update = sum(0.7 * torch.kron(layer.krona_A[n], layer.krona_B[n]) for n in ("a", "b"))
        base = layer.base_layer
        expected = torch.autograd.grad(functional.linear(x, base.weight + update, base.bias), leaves, target)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)

    @every_dtype
    def test_a_fresh_adapter_changes_nothing_and_is_yet_trained(self, dtype):
        base = nn.Linear(H, D, dtype=dtype)
        x = torch.randn(5, H, dtype=dtype)
        before = base(x)
        layer = KronALayer(base)
        layer.update_layer("default", 3, 4)
        y = layer(x)
        assert torch.equal(y, before)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert float(layer.krona_B["default"].grad.abs().sum()) > 0

    @every_dtype
    def test_the_output_has_the_bases_dtype_and_is_right_to_its_rounding(self, dtype):
        layer = krona_layer("a", "b", dtype=dtype)
        assert dtype == torch.float64 or layer.krona_A["a"].dtype == torch.float32
        x = torch.randn(6, H, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        exact = expected_output(layer, x, "a", "b")
        terms = (
            x.double().abs() @ (weight_of(layer).double().abs() + dense(layer, "a").abs() + dense(layer, "b").abs()).T
        )
        assert bool(((y.double() - exact).abs() <= 16 * torch.finfo(dtype).eps * (terms + 1)).all())

    def test_a_base_that_casts_its_input_decides_the_outputs_dtype(self):
        class Casting(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.to(self.weight.dtype))

        layer = KronALayer(Casting(H, D, dtype=torch.bfloat16))
        layer.update_layer("a", *FACTORS["a"], init_b="normal")
        layer.set_adapter("a")
        x = torch.randn(3, H)
        y = layer(x)
        assert y.dtype == torch.bfloat16 != x.dtype
        delta = y.double() - layer.base_layer(x).double()
        torch.testing.assert_close(delta, x.double() @ dense(layer, "a").T, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
    def test_autocast_gives_its_dtype_and_fp32_gradients(self, base_dtype):
        layer = krona_layer("a", dtype=base_dtype)
        x = torch.randn(6, H)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), expected_output(layer, x, "a"), rtol=0.05, atol=0.1)
        y.float().sum().backward()
        assert layer.krona_A["a"].grad.dtype == torch.float32
        assert float(layer.krona_A["a"].grad.abs().sum()) > 0

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_gives_the_same_gradients_even_with_dropout(self, reentrant):
        layer = krona_layer("a", "b", dropout=0.4)
        x = torch.randn(4, H, dtype=torch.float64, requires_grad=True)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def gradients(run) -> list[Tensor]:
            torch.manual_seed(1)
            for leaf in leaves:
                leaf.grad = None
            run(x).square().sum().backward()
            return [leaf.grad for leaf in leaves]

        plain = gradients(layer)
        checkpointed = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
        for ours, theirs in zip(checkpointed, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    def test_a_base_layer_that_takes_more_arguments_gets_them(self):
        class Scaled(nn.Linear):
            def forward(self, x: Tensor, factor: float = 1.0, *, shift: float = 0.0) -> Tensor:
                return super().forward(x) * factor + shift

        layer = KronALayer(Scaled(H, D))
        layer.update_layer("default", 3, 4)
        x = torch.randn(2, H)
        for enabled in (True, False):
            layer.enable_adapters(enabled)
            assert torch.equal(layer(x, 3.0, shift=1.0), layer.base_layer(x, 3.0, shift=1.0))

    def test_hooks_on_the_base_layer_still_see_and_change_what_it_does(self):
        layer = krona_layer("a")
        x = torch.randn(2, H, dtype=torch.float64)
        before, seen = layer(x), []
        layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)
        torch.testing.assert_close(layer(x), before + 1)
        assert len(seen) == 1
        assert seen[0] is x

    def test_an_adapter_of_another_method_may_lie_underneath(self):
        model = inject_adapter_in_model(
            LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), nn.Sequential(nn.Linear(H, D))
        )
        layer = KronALayer(model[0])
        layer.update_layer("default", 3, 4, init_b="normal")
        x = torch.randn(2, H)
        delta = x @ torch.kron(layer.krona_A["default"], layer.krona_B["default"]).T
        torch.testing.assert_close(layer(x), model[0](x) + delta)


forms = pytest.mark.parametrize(
    "form",
    [
        {"num_terms": 3},
        {"b_rank": 1},
        {"layout": "transposed"},
        {"num_terms": 2, "b_rank": 2},
        {"num_terms": 2, "b_rank": 1, "layout": "transposed"},
    ],
    ids=str,
)


def entrywise(layer: KronALayer, name: str) -> Tensor:
    """The dense update, entry by entry from the definitions in `KronAConfig`, in float64."""
    A = layer.krona_A[name].detach().double().view(-1, *layer.krona_A[name].shape[-2:])
    if name in layer.krona_B:
        B = layer.krona_B[name].detach().double().view(-1, *layer.krona_B[name].shape[-2:])
    else:
        B1, B2 = (f[name].detach().double().view(len(A), *f[name].shape[-2:]) for f in (layer.krona_B1, layer.krona_B2))
        B = torch.einsum("rkm,rml->rkl", B1, B2)
    order = "rij,rkl->ikjl" if layer.layout[name] == "kron" else "rij,rkl->kijl"
    return layer.scaling[name] * torch.einsum(order, A, B).reshape(layer.out_features, layer.in_features)


class TestForms:
    """Several terms, a B that is a product, and the layout of the paper's authors."""

    @forms
    @pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
    def test_the_output_and_all_gradients_are_those_of_the_dense_layer(self, form, lead):
        layer = krona_layer("a", "b", alpha=0.7)
        layer.update_layer("a", 3, 4, alpha=0.7, init_b="normal", **form)
        layer.double()
        layer.set_adapter(["a", "b"])
        x = torch.randn(*lead, H, dtype=torch.float64, requires_grad=True)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        weight = layer.base_layer.weight + layer.get_delta_weight("a") + layer.get_delta_weight("b")
        expected, y = functional.linear(x, weight, layer.base_layer.bias), layer(x)
        target = torch.randn_like(expected)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        pairs = zip(torch.autograd.grad(y, leaves, target), torch.autograd.grad(expected, leaves, target), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)

    @forms
    def test_the_delta_weight_is_the_sum_that_the_definitions_give(self, form):
        layer = KronALayer(nn.Linear(H, D))
        layer.update_layer("default", 3, 4, alpha=0.7, init_b="normal", **form)
        torch.testing.assert_close(
            layer.get_delta_weight("default").double(), entrywise(layer, "default"), rtol=1e-5, atol=1e-6
        )

    @forms
    @every_dtype
    def test_merging_rounds_that_sum_once_and_unmerging_restores_every_bit(self, form, dtype):
        layer = KronALayer(nn.Linear(H, D, dtype=dtype))
        layer.update_layer("default", 3, 4, init_b="normal", **form)
        before = layer.base_layer.weight.detach().clone()
        expected = before.double() + entrywise(layer, "default")
        layer.merge()
        torch.testing.assert_close(layer.base_layer.weight.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
        layer.unmerge()
        assert same_bits(layer.base_layer.weight, before)

    @forms
    def test_shapes_count_what_is_trained_and_a_fresh_adapter_changes_nothing_and_learns(self, form):
        layer = KronALayer(nn.Linear(H, D))
        layer.update_layer("default", 3, 4, **form)
        trained = layer.parameters_of("default")
        assert layer.shapes("default").parameters == sum(p.numel() for p in trained.values())
        assert {name.removeprefix("krona_"): tuple(p.shape) for name, p in trained.items()} == layer.shapes(
            "default"
        ).tensors
        x = torch.randn(5, H)
        y = layer(x)
        assert torch.equal(y, layer.base_layer(x))
        y.square().sum().backward()
        assert any(bool(p.grad.any()) for p in trained.values())

    @forms
    def test_starting_anew_as_a_plain_adapter_leaves_nothing_behind(self, form):
        layer = KronALayer(nn.Linear(H, D))
        layer.update_layer("default", 3, 4, **form)
        layer.update_layer("default", 2, 2)
        assert set(layer.parameters_of("default")) == {"krona_A", "krona_B"}
        assert layer.shapes("default").tensors == {"A": (2, 2), "B": (D // 2, H // 2)}
        layer.delete_adapter("default")
        assert not list(layer.krona_A) + list(layer.krona_B) + list(layer.krona_B1) + list(layer.layout)

    def test_b_stays_whole_where_a_product_would_not_be_smaller(self):
        layer = KronALayer(nn.Linear(H, D))
        layer.update_layer("default", 3, 4, b_rank=1000)
        assert set(layer.parameters_of("default")) == {"krona_A", "krona_B"}

    def test_several_terms_take_the_fused_way_and_a_transposed_layout_does_not(self):
        for form, fused in (({"num_terms": 2}, True), ({"b_rank": 1}, True), ({"layout": "transposed"}, False)):
            layer = KronALayer(nn.Linear(H, D))
            layer.update_layer("default", 3, 4, init_b="normal", **form)
            layer.base_layer.requires_grad_(False)
            y = layer(torch.randn(2, H))
            assert ("LinearWithKron" in type(y.grad_fn).__name__) == fused


class TestDropout:
    def test_zeroes_its_share_of_the_inputs_of_the_update_and_scales_the_others(self):
        """With A = 1 and B = I over a zero base, the output is what dropout leaves of the input."""
        layer = KronALayer(nn.Linear(50, 50, bias=False))
        nn.init.zeros_(layer.base_layer.weight)
        layer.update_layer("default", 1, 1, dropout=0.3)
        with torch.no_grad():
            layer.krona_A["default"].fill_(1)
            layer.krona_B["default"].copy_(torch.eye(50))
        x = torch.rand(400, 50) + 1
        y = layer(x).detach()
        kept = y != 0
        torch.testing.assert_close(y[kept], (x / 0.7)[kept])
        share = 1 - float(kept.float().mean())
        assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / x.numel())

    def test_touches_only_the_adapters_that_have_it_and_never_the_base(self):
        layer = krona_layer("a")
        layer.update_layer("b", 2, 10, init_b="normal", dropout=0.9)
        layer.double()
        x = torch.randn(6, H, dtype=torch.float64)
        torch.testing.assert_close(layer(x), expected_output(layer, x, "a"))
        layer.set_adapter(["a", "b"])
        assert not torch.allclose(layer(x), expected_output(layer, x, "a", "b"))
        with torch.no_grad():
            layer.krona_B["b"].zero_()
        torch.testing.assert_close(layer(x), expected_output(layer, x, "a"))

    def test_does_nothing_in_evaluation(self):
        layer = krona_layer("a", dropout=0.9).eval()
        x = torch.randn(6, H, dtype=torch.float64)
        torch.testing.assert_close(layer(x), expected_output(layer, x, "a"))
        assert torch.equal(layer(x), layer(x))


class TestWrapping:
    @pytest.mark.parametrize(
        "module", [nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Bilinear(4, 4, 4)]
    )
    def test_a_layer_that_is_not_linear_is_refused_by_its_class(self, module):
        with pytest.raises(FactorShapeError, match=rf"a {type(module).__name__}, and KronA adapts linear layers and"):
            KronALayer(module)

    def test_layer_size_is_outputs_then_inputs(self):
        assert layer_size(nn.Linear(3, 7)) == (7, 3, ())

    @pytest.mark.parametrize(("a1", "a2", "text"), [(5, 4, "a1=5"), (3, 7, "a2=7")])
    def test_factors_that_do_not_fit_are_refused_before_anything_is_added(self, a1, a2, text):
        layer = krona_layer()
        with pytest.raises(FactorShapeError, match=text):
            layer.update_layer("default", a1, a2)
        assert not layer.krona_A
        assert not layer.krona_B
        assert not layer.alpha

    @pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
    def test_factors_are_fp32_on_the_bases_device_whatever_the_default_dtype(self, default, base):
        usual = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            for device in ("cpu", "meta"):
                layer = KronALayer(nn.Linear(H, D, dtype=base, device=device))
                layer.update_layer("default", 3, 4)
                for factor in (layer.krona_A["default"], layer.krona_B["default"]):
                    assert factor.dtype == torch.float32
                    assert factor.device.type == device
        finally:
            torch.set_default_dtype(usual)

    def test_shapes_are_those_of_the_tensors(self):
        layer = krona_layer("a", "b")
        assert layer.shapes("a").factors == (3, 4, 4, 5)
        assert layer.shapes("b").factors == (2, 10, 6, 2)
        assert layer.krona_A["b"].shape == (2, 10)
        assert layer.krona_B["b"].shape == (6, 2)

    def test_only_the_first_adapter_becomes_active_and_trainable_by_being_added(self):
        layer = KronALayer(nn.Linear(H, D))
        layer.update_layer("default", 3, 4)
        layer.update_layer("other", 2, 10)
        assert layer.active_adapters == ["default"]
        flags = {name: p.requires_grad for name, p in layer.named_parameters() if "krona" in name}
        assert flags == {f"krona_{factor}.{name}": name == "default" for factor in "AB" for name in layer.alpha}

    def test_an_adapter_for_inference_is_added_frozen(self):
        layer = KronALayer(nn.Linear(H, D).requires_grad_(False))
        layer.update_layer("default", 3, 4, inference_mode=True)
        assert layer.active_adapters == ["default"]
        assert not any(p.requires_grad for p in layer.parameters())

    def test_an_adapter_can_be_started_anew_with_other_factors(self):
        layer = krona_layer("a", "b")
        layer.update_layer("a", 2, 2, alpha=3.0)
        assert layer.shapes("a").factors == (2, 2, 6, 10)
        assert layer.scaling["a"] == 3.0
        assert not layer.krona_B["a"].any()
        assert sorted(layer.krona_A) == ["a", "b"]

    def test_the_delta_weight_is_the_scaled_dense_product(self):
        layer = krona_layer("a", alpha=0.25)
        torch.testing.assert_close(layer.get_delta_weight("a"), dense(layer, "a"))
        assert layer.get_delta_weight("a").shape == weight_of(layer).shape

    def test_factors_in_another_memory_layout_work_everywhere(self):
        layer = krona_layer("a")
        delta, x = layer.get_delta_weight("a").detach(), torch.randn(2, H, dtype=torch.float64)
        y = layer(x).detach()
        for factors in (layer.krona_A, layer.krona_B):
            factors["a"] = nn.Parameter(factors["a"].detach().T.contiguous().T)
            assert not factors["a"].is_contiguous()
        assert torch.equal(layer.get_delta_weight("a"), delta)
        torch.testing.assert_close(layer(x), y)
        layer.merge()
        torch.testing.assert_close(layer(x), y)

    def test_a_state_dict_holds_base_and_factors_and_loads_into_another_layer(self):
        layer, other = krona_layer("a", "b"), krona_layer("a", "b")
        state = layer.state_dict()
        factors = {f"krona_{factor}.{name}" for factor in "AB" for name in "ab"}
        assert state.keys() == {"base_layer.weight", "base_layer.bias"} | factors
        x = torch.randn(3, H, dtype=torch.float64)
        assert not torch.equal(layer(x), other(x))
        other.load_state_dict(state)
        assert torch.equal(layer(x), other(x))

    @pytest.mark.parametrize("merged", [False, True])
    def test_a_deep_copy_is_equal_and_independent(self, merged):
        layer = krona_layer("a", "b", dtype=torch.bfloat16)
        original = weight_of(layer).clone()
        if merged:
            layer.merge(adapter_names=["a"])
        twin = copy.deepcopy(layer)
        x = torch.randn(3, H).bfloat16()
        before = layer(x)
        assert torch.equal(twin(x), before)
        with torch.no_grad():
            twin.krona_A["b"].mul_(3)
        twin.set_scale("b", 5.0)
        twin.unmerge()
        assert same_bits(weight_of(twin), original)
        assert torch.equal(layer(x), before)
        layer.unmerge()
        assert same_bits(weight_of(layer), original)


class Peers(RuleBasedStateMachine):
    """The same calls on PEFT's LoRA and on ours leave adapters, scales, flags and merged names the same."""

    @initialize()
    def build(self) -> None:
        torch.manual_seed(0)
        names = sorted(FACTORS)
        lora = krona = None
        for name in names:
            model = nn.Sequential(nn.Linear(H, D)) if lora is None else lora
            config = LoraConfig(r=1, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
            lora = inject_adapter_in_model(config, model, adapter_name=name)
            model = nn.Sequential(nn.Linear(H, D)) if krona is None else krona
            a1, a2 = FACTORS[name]
            config = KronAConfig(a1=a1, a2=a2, alpha=2, target_modules=["0"], init_weights=False)
            krona = inject_adapter_in_model(config, model, adapter_name=name)
        self.pair = (lora[0], krona[0])
        self.alive = set(names)

    def both(self, method: str, *args, **kwargs) -> None:
        for layer in self.pair:
            quietly(getattr(layer, method), *args, **kwargs)

    @rule(names=st.lists(st.sampled_from(sorted(FACTORS)), min_size=1, unique=True), inference=st.booleans())
    def set_adapter(self, names, inference):
        self.both("set_adapter", names, inference_mode=inference)

    @rule(enabled=st.booleans())
    def enable_adapters(self, enabled):
        self.both("enable_adapters", enabled)

    @rule(name=st.sampled_from([*sorted(FACTORS), "nobody"]), scale=st.sampled_from([0.0, 0.5, 3.0]))
    def set_scale(self, name, scale):
        self.both("set_scale", name, scale)

    @rule(scale=st.sampled_from([1, 0.5, 3.0]))
    def scale_layer(self, scale):
        self.both("scale_layer", scale)

    @rule(scale=st.sampled_from([None, 0.5, 3.0]))
    def unscale_layer(self, scale):
        self.both("unscale_layer", scale)

    @rule(name=st.sampled_from(sorted(FACTORS)), flag=st.booleans())
    def set_requires_grad(self, name, flag):
        self.both("set_requires_grad", name, flag)

    @rule(names=st.none() | st.lists(st.sampled_from(sorted(FACTORS)), unique=True))
    def merge(self, names):
        self.both("merge", adapter_names=names)

    @rule()
    def unmerge(self):
        self.both("unmerge")

    @rule()
    def forward(self):
        x = torch.randn(1, H)
        for layer in self.pair:
            layer(x)

    @precondition(lambda self: len(self.alive) > 1)
    @rule(data=st.data())
    def delete_adapter(self, data):
        # A merged adapter is where the two part ways: ours comes out of the weight, LoRA's stays in for good.
        self.both("unmerge")
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.alive.remove(name)
        self.both("delete_adapter", name)

    @invariant()
    def states_are_equal(self):
        lora, krona = self.pair
        assert set(krona.krona_A) == set(krona.krona_B) == set(lora.lora_A)
        assert krona.active_adapters == lora.active_adapters
        assert krona.disable_adapters == lora.disable_adapters
        assert krona.merged == lora.merged
        assert krona.merged_adapters == [name for name in lora.merged_adapters if name in krona.krona_A]
        assert dict(krona.scaling) == dict(lora.scaling)
        for name in krona.krona_A:
            theirs = {p.requires_grad for p in (lora.lora_A[name].weight, lora.lora_B[name].weight)}
            assert {krona.krona_A[name].requires_grad, krona.krona_B[name].requires_grad} == theirs
        assert not any(p.requires_grad for p in krona.base_layer.parameters())


TestPeers = Peers.TestCase
TestPeers.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)


class Merging(RuleBasedStateMachine):
    """Whatever is merged, changed and deleted in any order, the weight holds exactly the merged terms."""

    @initialize(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
    def build(self, dtype, seed):
        torch.manual_seed(seed)
        self.layer = krona_layer(*FACTORS, dtype=dtype)
        self.original = weight_of(self.layer).clone()
        self.merged: dict[str, Tensor] = {}
        self.x = torch.randn(3, H, dtype=dtype)

    @rule(names=st.lists(st.sampled_from(sorted(FACTORS)), max_size=4))
    def merge(self, names):
        new = [name for name in names if name in self.layer.krona_A and name not in self.merged]
        quietly(self.layer.merge, adapter_names=names)
        self.merged |= {name: dense(self.layer, name) for name in new}

    @rule()
    def merge_the_active_ones(self):
        active = [name for name in self.layer.active_adapters if name in self.layer.krona_A]
        new = [name for name in active if name not in self.merged]
        quietly(self.layer.merge)
        self.merged |= {name: dense(self.layer, name) for name in new}

    @rule(names=st.lists(st.sampled_from([*sorted(FACTORS), "nobody"]), max_size=4))
    def unmerge_some(self, names):
        self.layer.unmerge(names)
        self.merged = {name: delta for name, delta in self.merged.items() if name not in names}

    @rule()
    def unmerge_all(self):
        self.layer.unmerge()
        self.merged = {}
        assert same_bits(weight_of(self.layer), self.original)

    @rule(names=st.lists(st.sampled_from(sorted(FACTORS)), min_size=1, unique=True))
    def set_adapter(self, names):
        self.layer.set_adapter(names)

    @rule(name=st.sampled_from(sorted(FACTORS)), scale=st.sampled_from([-1.0, 0.0, 1e-3, 2.0]))
    def set_scale(self, name, scale):
        self.layer.set_scale(name, scale)

    @rule(name=st.sampled_from(sorted(FACTORS)))
    def train_a_factor_in_place(self, name):
        with torch.no_grad():
            for factors in (self.layer.krona_A, self.layer.krona_B):
                if name in factors:
                    factors[name].mul_(-0.9).add_(0.01)  # growing, it would leave fp16's range

    @rule()
    def run_disabled(self):
        self.layer.enable_adapters(False)
        base = functional.linear(self.x, self.original, self.layer.base_layer.bias)
        assert torch.equal(self.layer(self.x), base)
        self.merged = {}
        assert same_bits(weight_of(self.layer), self.original)
        self.layer.enable_adapters(True)

    @precondition(lambda self: len(self.layer.krona_A) > 1)
    @rule(name=st.sampled_from(sorted(FACTORS)))
    def delete(self, name):
        quietly(self.layer.delete_adapter, name)
        self.merged.pop(name, None)

    @rule(name=st.sampled_from(sorted(FACTORS)))
    def add_back(self, name):
        if name not in self.layer.krona_A:
            self.layer.update_layer(name, *FACTORS[name], init_b="normal")

    @invariant()
    def the_weight_is_the_original_plus_the_merged_updates(self):
        weight, dtype = weight_of(self.layer), self.original.dtype
        assert list(self.layer.merged_adapters) == list(self.merged)
        if not self.merged:
            assert same_bits(weight, self.original)
            assert self.layer.restoration is None
            return
        exactly = self.original.double() + sum(self.merged.values())
        largest = self.original.double().abs() + sum(delta.abs() for delta in self.merged.values())
        fp32 = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        bound = exactly.abs() * torch.finfo(dtype).eps / 2 + 8 * fp32 * largest + torch.finfo(dtype).smallest_normal
        assert bool(((weight.double() - exactly).abs() <= bound).all())
        assert self.layer.restoration.nbytes <= weight.nbytes

    @invariant()
    def the_output_has_each_update_once(self):
        live = [n for n in self.layer.active_adapters if n in self.layer.krona_A and n not in self.merged]
        update = sum(self.merged.values(), dense(self.layer, *live))
        weight, bias = self.original.double(), self.layer.base_layer.bias.double()
        expected = functional.linear(self.x.double(), weight + update, bias)
        largest = sum([delta.abs() for delta in self.merged.values()], weight.abs())
        largest = sum([dense(self.layer, name).abs() for name in live], largest)
        bound = 16 * torch.finfo(self.original.dtype).eps * (self.x.double().abs() @ largest.T + bias.abs() + 1e-3)
        with torch.no_grad():
            assert bool(((self.layer(self.x).double() - expected).abs() <= bound).all())

    def teardown(self):
        if hasattr(self, "layer"):
            self.layer.unmerge()
            assert same_bits(weight_of(self.layer), self.original)


TestMergingInAnyOrder = Merging.TestCase
TestMergingInAnyOrder.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)


class TestMerging:
    @every_dtype
    @pytest.mark.parametrize("subset", [["a"], ["b", "a"], ["a", "b", "c"]])
    def test_merged_output_is_the_unmerged_one_and_unmerging_restores_every_bit(self, dtype, subset):
        layer = krona_layer(*FACTORS, dtype=dtype, alpha=0.1)
        before, x = weight_of(layer).clone(), torch.randn(5, H, dtype=dtype)
        unmerged = layer(x)
        layer.merge(adapter_names=subset)
        assert layer.merged_adapters == subset
        tolerance = 50 * torch.finfo(dtype).eps
        torch.testing.assert_close(layer(x), unmerged, rtol=tolerance, atol=tolerance)
        assert not same_bits(weight_of(layer), before)
        layer.unmerge()
        assert same_bits(weight_of(layer), before)
        assert torch.equal(layer(x), unmerged)

    def test_the_merged_weight_is_the_same_tensor_and_the_bias_is_untouched(self):
        layer = krona_layer("a")
        weight, bias = weight_of(layer), layer.base_layer.bias.clone()
        memory = weight.data_ptr()
        layer.merge()
        assert weight_of(layer) is weight
        assert weight.data_ptr() == memory
        assert torch.equal(layer.base_layer.bias, bias)
        assert not weight.requires_grad
        layer.unmerge()
        assert weight_of(layer) is weight

    def test_factors_trained_between_merging_and_unmerging_do_not_spoil_the_base(self):
        layer = krona_layer("a", dtype=torch.bfloat16)
        before = weight_of(layer).clone()
        layer.merge()
        merged = weight_of(layer).clone()
        with torch.no_grad():
            layer.krona_A["a"].mul_(7)
            layer.krona_B["a"].normal_()
        layer.set_scale("a", 9.0)
        assert same_bits(weight_of(layer), merged)
        layer.unmerge()
        assert same_bits(weight_of(layer), before)
        layer.merge()
        torch.testing.assert_close(weight_of(layer).double(), before.double() + dense(layer, "a"), rtol=0.01, atol=0.01)

    def test_a_base_that_requires_gradients_is_merged_too(self):
        layer = krona_layer("a")
        layer.base_layer.requires_grad_(True)
        before = weight_of(layer).detach().clone()
        layer.merge()
        layer.unmerge()
        assert same_bits(weight_of(layer).detach(), before)

    @pytest.mark.parametrize("call", ["unmerge", "merge", "delete", "disabled forward"])
    def test_after_a_cast_while_merged_the_error_says_what_happened_and_nothing_changes(self, call):
        layer = krona_layer("a", "b", dtype=torch.bfloat16)
        layer.merge(adapter_names=["a"])
        layer.base_layer.float()
        before = weight_of(layer).clone()
        calls = {
            "unmerge": layer.unmerge,
            "merge": lambda: quietly(layer.merge, adapter_names=["b"]),
            "delete": lambda: layer.delete_adapter("a"),
            "disabled forward": lambda: (layer.enable_adapters(False), layer(torch.randn(2, H))),
        }
        with pytest.raises(MergeError, match=r"merged in torch.bfloat16 and is now torch.float32.*cast only unmerged"):
            calls[call]()
        assert same_bits(weight_of(layer), before)
        assert layer.merged_adapters == ["a"]
        assert "a" in layer.krona_A
        layer.base_layer.bfloat16()
        layer.unmerge()

    @pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
    @pytest.mark.parametrize("already", [[], ["b"]])
    def test_a_merge_that_would_not_be_finite_changes_nothing_and_keeps_what_was_merged(self, value, already):
        layer = krona_layer("a", "b", dtype=torch.float16)
        original = weight_of(layer).clone()
        layer.merge(adapter_names=already)
        before = weight_of(layer).clone()
        with torch.no_grad():
            layer.krona_B["a"][0, 0] = value
        with pytest.raises(MergeError, match="infinity or a NaN"):
            quietly(layer.merge, adapter_names=["a"])
        assert same_bits(weight_of(layer), before)
        assert layer.merged_adapters == already
        layer.unmerge()
        assert same_bits(weight_of(layer), original)

    def test_a_check_touches_neither_the_weight_nor_what_is_kept_to_unmerge_it(self):
        layer = krona_layer("a", "b", dtype=torch.bfloat16)
        original = weight_of(layer).clone()
        layer.merge(adapter_names=["a"])
        writes, kept = weight_of(layer)._version, layer.restoration
        layer.check_mergeable(layer.merge_terms(["b"]))
        assert weight_of(layer)._version == writes
        assert layer.restoration is kept
        layer.unmerge()
        assert same_bits(weight_of(layer), original)

    def test_what_is_merged_already_counts_once_when_more_is_checked(self):
        layer = krona_layer("a", "b", dtype=torch.float16)
        original = weight_of(layer).clone()
        with torch.no_grad():
            for factor in (layer.krona_A["a"], layer.krona_B["a"]):
                factor.fill_(200)
        layer.merge(adapter_names=["a"])
        # 40,000 is more than half of what fp16 holds.
        quietly(layer.merge, adapter_names=["b"])
        assert layer.merged_adapters == ["a", "b"]
        layer.unmerge()
        assert same_bits(weight_of(layer), original)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
    def test_a_quantized_base_is_refused_by_its_dtype(self, dtype):
        layer = krona_layer("a", dtype=torch.float32)
        stored = (weight_of(layer).detach() * 10).to(dtype)
        layer.base_layer.weight = nn.Parameter(stored.clone(), requires_grad=False)
        with pytest.raises(MergeError, match=rf"a Linear, keeps its weight as a Parameter of {dtype} .*unquantized"):
            layer.merge()
        assert torch.equal(weight_of(layer).view(torch.uint8), stored.view(torch.uint8))
        assert not layer.merged

    def test_a_packed_base_is_refused_by_its_shape(self):
        layer = krona_layer("a", dtype=torch.float32)
        layer.base_layer.weight = nn.Parameter(torch.zeros(D * H // 2, 1))
        with pytest.raises(MergeError, match=r"of shape \(120, 1\).*unquantized"):
            layer.merge()

    def test_names_without_an_adapter_here_are_passed_over(self):
        layer = krona_layer("a")
        before = weight_of(layer).clone()
        layer.merge(adapter_names=["nobody"])
        layer.unmerge(["nobody"])
        layer.unmerge()
        assert not layer.merged
        assert same_bits(weight_of(layer), before)

    @pytest.mark.parametrize("method", ["merge", "unmerge"])
    def test_a_single_name_is_refused_because_its_letters_could_be_names_too(self, method):
        layer = krona_layer("a", "b")
        layer.merge()
        merged = weight_of(layer).clone()
        with pytest.raises(TypeError, match="should be a list of strings, got 'ab'"):
            getattr(layer, method)(adapter_names="ab")
        assert same_bits(weight_of(layer), merged)

    def test_a_deleted_adapter_leaves_the_weight_and_its_name_can_be_used_again(self):
        layer = krona_layer("a", "b")
        original = weight_of(layer).clone()
        layer.merge()
        layer.delete_adapter("a")
        assert layer.merged_adapters == ["b"]
        layer.update_layer("a", 2, 2, init_b="normal")
        layer.double()
        layer.set_adapter(["a", "b"])
        x = torch.randn(2, H, dtype=torch.float64)
        base = functional.linear(x, original + dense(layer, "a", "b"), layer.base_layer.bias)
        torch.testing.assert_close(layer(x), base)
        quietly(layer.merge)
        torch.testing.assert_close(layer(x), base)
        layer.unmerge()
        assert same_bits(weight_of(layer), original)

    def test_merging_reaches_the_base_beneath_another_methods_adapter(self):
        model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(H, D)))
        layer = KronALayer(model[0])
        layer.update_layer("default", 3, 4, init_b="normal")
        x = torch.randn(2, H)
        before, original = layer(x), weight_of(layer).clone()
        layer.merge()
        torch.testing.assert_close(layer(x), before)
        layer.unmerge()
        assert same_bits(weight_of(layer), original)


# A is 64 × 32 and B is 32 × 128: enough entries for statistics, and every bound another number.
BIG = {"a1": 64, "a2": 32}
BIG_D, BIG_H = 64 * 32, 32 * 128


def big_factors(**init) -> dict[str, Tensor]:
    layer = KronALayer(nn.Linear(BIG_H, BIG_D, device="meta"))
    layer.base_layer = nn.utils.skip_init(nn.Linear, BIG_H, BIG_D)
    layer.update_layer("default", **BIG, **init)
    return {"init_a": layer.krona_A["default"].detach(), "init_b": layer.krona_B["default"].detach()}


def assert_mean_and_deviation(factor: Tensor, deviation: float) -> None:
    n = factor.numel()
    assert abs(float(factor.mean())) < 5 * deviation / math.sqrt(n)
    assert float(factor.std()) == pytest.approx(deviation, rel=5 / math.sqrt(2 * n))


class TestInit:
    @pytest.mark.parametrize("which", ["init_a", "init_b"])
    @pytest.mark.parametrize(("init", "deviation"), [("normal", 1 / 32), ("normal_sqrt", math.sqrt(min(BIG_D, BIG_H)))])
    def test_normal_factors_have_the_standard_deviation_that_the_name_stands_for(self, which, init, deviation):
        factor = big_factors(**{which: init})[which]
        assert_mean_and_deviation(factor, deviation)
        # A normal distribution has entries far out, which a uniform one of this deviation has not.
        assert float(factor.abs().max()) > 2.5 * deviation

    @pytest.mark.parametrize(
        ("which", "init", "bound"),
        [
            ("init_a", "kaiming_uniform", math.sqrt(6 / 32)),
            ("init_b", "kaiming_uniform", math.sqrt(6 / 128)),
            ("init_a", "xavier_uniform", math.sqrt(6 / (64 + 32))),
            ("init_b", "xavier_uniform", math.sqrt(6 / (32 + 128))),
        ],
    )
    def test_uniform_factors_fill_their_bounds_and_no_more(self, which, init, bound):
        factor = big_factors(**{which: init})[which]
        assert_mean_and_deviation(factor, bound / math.sqrt(3))
        assert 0.98 * bound < float(factor.abs().max()) <= bound

    @pytest.mark.parametrize("init", ["kaiming_uniform", "xavier_uniform"])
    def test_uniform_bounds_are_those_of_torch(self, init):
        factor = big_factors(init_a=init)["init_a"]
        theirs = torch.empty_like(factor)
        if init == "kaiming_uniform":
            nn.init.kaiming_uniform_(theirs, nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(theirs)
        assert float(factor.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.02)

    def test_the_defaults_are_a_normal_a_and_a_zero_b(self):
        factors = big_factors()
        assert_mean_and_deviation(factors["init_a"], 1 / 32)
        assert not factors["init_b"].any()

    def test_zeros_are_zeros(self):
        factors = big_factors(init_a="zeros", init_b="normal")
        assert not factors["init_a"].any()
        assert factors["init_b"].any()

    def test_without_init_weights_the_update_is_not_zero_whatever_the_names_say(self):
        config = KronAConfig(a1=3, a2=4, target_modules=["0"], init_a="zeros", init_b="zeros", init_weights=False)
        layer = inject_adapter_in_model(config, nn.Sequential(nn.Linear(H, D)))[0]
        assert bool((layer.get_delta_weight("default") != 0).all())

    @settings(deadline=None, max_examples=20)
    @given(seed=st.integers(0, 2**31))
    def test_the_same_seed_gives_the_same_factors(self, seed):
        pairs = []
        for _ in range(2):
            torch.manual_seed(seed)
            pairs.append(parameters_of_a_new_layer())
        assert all(map(torch.equal, *pairs))


def parameters_of_a_new_layer() -> list[Tensor]:
    layer = krona_layer("a")
    return [p.detach() for p in layer.parameters()]


def test_quantized_weights_and_other_tensor_subclasses_are_left_to_the_base_layer():
    class Quantized(Tensor):
        pass

    base = nn.Linear(4, 4).requires_grad_(False)
    x = torch.randn(2, 4)
    assert can_fuse(base, x)
    assert not can_fuse(base, x.as_subclass(Quantized))
    base.weight = nn.Parameter(base.weight.data.as_subclass(Quantized), requires_grad=False)
    assert not can_fuse(base, x)
