"""Nearest Kronecker products against the full SVD of a plainly rearranged ΔW in float64."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusekrona.errors import FactorShapeError, KronAError
from diffusekrona.kron import lanczos
from diffusekrona.kron import nearest as approximate
from diffusekrona.kron.nearest import TIE, Approximation, Delta, Kronecker, LowRank, choose_factors, nearest_kronecker
from diffusekrona.kron.rearranged import Rearranged
from diffusekrona.kron.shapes import FactorShapes, divisors, factor_shapes, krona_parameters, legal_factors
from tests.tensors import LargestTensor, layouts, shapes_of_factors

ROUNDING = 1e-7

many = settings(deadline=None, max_examples=40)
some = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
terms = st.integers(1, 5)


def rearranged(dense: Tensor, s: FactorShapes) -> Tensor:
    return dense.double().reshape(s.a1, s.b1, s.a2, s.b2).permute(0, 2, 1, 3).reshape(s.a1 * s.a2, s.b1 * s.b2)


def least_error(dense: Tensor, s: FactorShapes, num_terms: int) -> float:
    sigma = torch.linalg.svdvals(rearranged(dense, s))
    total = float(sigma.square().sum())
    return math.sqrt(float(sigma[num_terms:].square().sum()) / total) if total else 0.0


def built(delta: Delta | Approximation) -> Tensor:
    if isinstance(delta, Tensor):
        return delta.double()
    if isinstance(delta, LowRank):
        return delta.up.double() @ delta.down.double()
    return sum(torch.kron(A, B) for A, B in zip(delta.A.double(), delta.B.double(), strict=True))


def measured_error(found: Approximation, delta: Delta) -> float:
    dense = built(delta)
    return float((dense - built(found)).norm() / dense.norm())


def random(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_low_rank(d: int, h: int, r: int, seed: int) -> LowRank:
    return LowRank(random(d, r, seed=seed), random(r, h, seed=seed + 1))


def random_kronecker(s: FactorShapes, count: int, seed: int) -> Kronecker:
    return Kronecker(random(count, s.a1, s.a2, seed=seed), random(count, s.b1, s.b2, seed=seed + 1))


@st.composite
def deltas(draw: st.DrawFn, d: int, h: int) -> Delta:
    """A ΔW of each kind, the Kronecker products of any factor shapes, some of them with falling singular values."""
    kind, count, seed = draw(st.sampled_from(["dense", "low rank", "kronecker"])), draw(terms), draw(seeds)
    if kind == "dense":
        decay = 0.5 ** (draw(st.sampled_from([0.0, 0.3, 3.0])) * torch.arange(h))
        return draw(layouts)(random(d, h, seed=seed) * decay)
    if kind == "low rank":
        return random_low_rank(d, h, count, seed)
    a1, a2 = draw(st.sampled_from(divisors(d))), draw(st.sampled_from(divisors(h)))
    return random_kronecker(factor_shapes(d, h, a1, a2), count, seed)


@pytest.mark.parametrize("small_side", [lanczos._SMALL_SIDE, 0])
@many
@given(shapes=shapes_of_factors, num_terms=terms, data=st.data())
def test_the_error_is_the_least_possible_of_any_delta(small_side, shapes, num_terms, data, monkeypatch):
    monkeypatch.setattr(lanczos, "_SMALL_SIDE", small_side)
    delta = data.draw(deltas(shapes.d, shapes.h))
    found = nearest_kronecker(delta, shapes.a1, shapes.a2, num_terms)
    assert found.A.shape == (num_terms, shapes.a1, shapes.a2)
    assert found.B.shape == (num_terms, shapes.b1, shapes.b2)
    assert found.A.dtype == found.B.dtype == torch.float32
    least = least_error(built(delta), shapes, num_terms)
    assert found.error == pytest.approx(least, rel=1e-6, abs=ROUNDING)
    assert measured_error(found, delta) == pytest.approx(least, rel=1e-6, abs=num_terms * 2e-7)
    assert found.norm == pytest.approx(float(built(delta).norm()), rel=1e-9)


@many
@given(shapes=shapes_of_factors, num_terms=terms, data=st.data())
def test_terms_are_the_singular_ones_split_evenly_and_in_falling_order(shapes, num_terms, data):
    delta = data.draw(deltas(shapes.d, shapes.h))
    found = nearest_kronecker(delta, shapes.a1, shapes.a2, num_terms)
    sigma = torch.linalg.svdvals(rearranged(built(delta), shapes))[:num_terms]
    sigma = torch.nn.functional.pad(sigma, (0, num_terms - len(sigma)))
    for factor in (found.A, found.B):
        vectors = factor.flatten(1).double()
        near = 2e-6 * float(sigma[0])
        torch.testing.assert_close(vectors @ vectors.T, torch.diag(sigma), rtol=0, atol=near)
    assert bool((found.A.flatten(1).norm(dim=1).diff() <= 1e-6 * sigma[0].sqrt()).all())


@many
@given(shapes=shapes_of_factors, count=st.integers(1, 3), seed=seeds)
def test_a_kronecker_product_of_these_shapes_is_recovered(shapes, count, seed):
    known = random_kronecker(shapes, count, seed)
    for delta in (known, built(known)):
        found = nearest_kronecker(delta, shapes.a1, shapes.a2, count)
        assert found.error <= ROUNDING
        assert measured_error(found, delta) <= 3e-7 * count


@pytest.mark.parametrize(("a1", "a2"), [(4, 64), (32, 32), (16, 40), (1, 1280), (1280, 1), (1, 1), (80, 64)])
def test_exact_cases_of_a_wide_layer_have_an_error_of_rounding_only(a1, a2):
    shapes = factor_shapes(1280, 1280, a1, a2)
    known = random_kronecker(shapes, 2, seed=1)
    for delta in (known, built(known)):
        found = nearest_kronecker(delta, a1, a2, num_terms=2)
        assert found.error <= ROUNDING
        assert measured_error(found, delta) <= 5e-7


def test_a_lora_is_a_kronecker_product_of_its_columns_and_rows():
    delta = random_low_rank(48, 36, 3, seed=2)
    assert nearest_kronecker(delta, 48, 1, num_terms=3).error <= ROUNDING
    assert nearest_kronecker(delta, 1, 36, num_terms=3).error <= ROUNDING
    assert nearest_kronecker(delta, 48, 1, num_terms=2).error > 0.1


def with_singular_values(sigma: list[float], s: FactorShapes, seed: int) -> Tensor:
    """A ΔW whose rearrangement has these singular values."""
    left = torch.linalg.qr(random(s.a1 * s.a2, len(sigma), seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(random(s.b1 * s.b2, len(sigma), seed=seed + 1, dtype=torch.float64)).Q
    R = (left * torch.tensor(sigma)) @ right.T
    return R.reshape(s.a1, s.a2, s.b1, s.b2).transpose(1, 2).reshape(s.d, s.h)


def test_singular_values_far_below_the_largest_are_found():
    shapes, sigma = FactorShapes(3, 4, 5, 6), [1.0, 1e-4, 1e-8, 1e-11]
    found = nearest_kronecker(with_singular_values(sigma, shapes, seed=3), shapes.a1, shapes.a2, num_terms=5)
    norms = (found.A.flatten(1).double().norm(dim=1) * found.B.flatten(1).double().norm(dim=1)).tolist()
    assert norms == [pytest.approx(s, rel=1e-3) for s in sigma] + [0.0]


def test_the_best_of_values_far_below_the_largest_are_taken():
    shapes, sigma = FactorShapes(3, 4, 5, 6), [1.0, *(1e-4 * 0.9**i for i in range(11))]
    delta = with_singular_values(sigma, shapes, seed=4)
    assert nearest_kronecker(delta, 3, 4, 2).error == pytest.approx(least_error(delta, shapes, 2), rel=1e-6)


@pytest.mark.parametrize("shapes", [FactorShapes(24, 24, 25, 24), FactorShapes(25, 24, 24, 24)])
def test_equal_singular_values_are_all_found_by_the_iteration(shapes):
    sigma = [1.0] * 3 + [0.9 * 0.97**i for i in range(200)]
    delta = with_singular_values(sigma, shapes, seed=5)
    with FlopCounterMode(display=False) as counter:
        found = nearest_kronecker(delta, shapes.a1, shapes.a2, num_terms=3)
    assert counter.get_total_flops() < 576**3
    assert found.error == pytest.approx(least_error(delta, shapes, 3), rel=1e-6)


def test_terms_beyond_the_rank_are_zeros():
    shapes = FactorShapes(3, 2, 4, 5)
    known = random_kronecker(shapes, 2, seed=5)
    low_rank = LowRank(random(12, 1, seed=6), random(1, 10, seed=7))
    for delta, rank in ((known, 2), (built(known), 2), (low_rank, 6), (random(12, 10, seed=8), 6)):
        found = nearest_kronecker(delta, 3, 2, num_terms=8)
        for factor in (found.A, found.B):
            assert bool(factor[:rank].flatten(1).any(dim=1).all())
            assert not bool(factor[rank:].any())
        assert found.error <= ROUNDING


@pytest.mark.parametrize(
    "delta",
    [
        torch.zeros(6, 8),
        LowRank(torch.ones(6, 2), torch.zeros(2, 8)),
        Kronecker(torch.zeros(3, 2, 2), torch.ones(3, 3, 4)),
    ],
)
def test_zero_is_approximated_by_zeros_without_error(delta):
    found = nearest_kronecker(delta, 3, 2, num_terms=2)
    assert not bool(found.A.any() or found.B.any())
    assert (found.error, found.norm) == (0.0, 0.0)
    # 1·8 + 6·1 parameters are as few as those of (2, 4), (3, 2) and (6, 1), and the fewest.
    assert choose_factors(delta, 1000) == (1, 8)


@some
@given(shapes=shapes_of_factors, data=st.data())
def test_no_step_to_other_factors_comes_nearer(shapes, data):
    delta = data.draw(deltas(shapes.d, shapes.h))
    found = nearest_kronecker(delta, shapes.a1, shapes.a2, num_terms=2)
    for step in (1.0, 1e-2, 1e-3):
        A, B = (
            F + step * F.norm() / math.sqrt(F.numel()) * random(*F.shape, seed=9 + i)
            for i, F in enumerate((found.A.double(), found.B.double()))
        )
        assert measured_error(Approximation(A, B, 0.0, 0.0), delta) >= found.error - ROUNDING


@some
@given(shapes=shapes_of_factors, data=st.data())
def test_results_repeat_and_the_largest_entry_of_each_a_is_positive(shapes, data):
    delta = data.draw(deltas(shapes.d, shapes.h))
    found, again = (nearest_kronecker(delta, shapes.a1, shapes.a2, num_terms=2) for _ in range(2))
    assert torch.equal(found.A, again.A)
    assert torch.equal(found.B, again.B)
    for A in found.A:
        assert A.flatten()[A.abs().argmax()] >= 0
    opposite = nearest_kronecker(-built(delta), shapes.a1, shapes.a2, num_terms=1)
    dense = nearest_kronecker(built(delta), shapes.a1, shapes.a2, num_terms=1)
    torch.testing.assert_close(opposite.A, dense.A)
    torch.testing.assert_close(opposite.B, -dense.B)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_is_computed_from_its_exact_values(dtype):
    deltas = [
        random(24, 36, seed=10, dtype=dtype),
        LowRank(random(24, 2, seed=11, dtype=dtype), random(2, 36, seed=12, dtype=dtype)),
        Kronecker(random(2, 3, 4, seed=13, dtype=dtype), random(2, 8, 9, seed=14, dtype=dtype)),
    ]
    for delta in deltas:
        found, dense = (nearest_kronecker(given, 4, 6, num_terms=2) for given in (delta, built(delta)))
        assert found.A.dtype == torch.float32
        torch.testing.assert_close(found.A, dense.A)
        torch.testing.assert_close(found.B, dense.B)
        assert found.error == pytest.approx(dense.error, rel=1e-12)


def test_terms_that_cancel_each_other_leave_the_rest_in_full_precision():
    A, B = random(1, 6, 4, seed=15), random(1, 4, 6, seed=16)
    little = random(1, 6, 4, seed=17) * 1e-6
    delta = Kronecker(torch.cat([A, -A, little]).double(), torch.cat([B, B, B]).double())
    found = nearest_kronecker(delta, 6, 4)
    assert found.norm == pytest.approx(float(little.double().norm() * B.double().norm()), rel=1e-8)
    assert found.error <= ROUNDING


def test_parameters_are_read_and_left_alone():
    up, down = random(8, 2, seed=18).requires_grad_(), random(2, 6, seed=19).requires_grad_()
    before = up.detach().clone(), down.detach().clone()
    found = nearest_kronecker(LowRank(up, down), 2, 3)
    assert not found.A.requires_grad
    assert torch.equal(up, before[0])
    assert torch.equal(down, before[1])
    assert up.grad is None


@pytest.mark.parametrize("shapes", [FactorShapes(20, 32, 30, 20), FactorShapes(30, 20, 20, 32)])
@pytest.mark.parametrize("kind", ["dense", "low rank", "kronecker"])
def test_large_rearrangements_are_iterated_to_the_least_error_without_a_gram_matrix(shapes, kind):
    d, h = shapes.d, shapes.h
    delta = {
        "dense": random(d, h, seed=20),
        "low rank": random_low_rank(d, h, 3, seed=21),
        "kronecker": random_kronecker(FactorShapes(10, 128, 60, 5), 2, seed=22),
    }[kind]
    assert min(shapes.a1 * shapes.a2, shapes.b1 * shapes.b2) > lanczos._SMALL_SIDE
    state = torch.get_rng_state()
    with FlopCounterMode(display=False) as counter:
        found = nearest_kronecker(delta, shapes.a1, shapes.a2, num_terms=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert counter.get_total_flops() < 600**2 * 640 * 2
    assert found.error == pytest.approx(least_error(built(delta), shapes, 3), rel=1e-6, abs=ROUNDING)
    assert measured_error(found, delta) == pytest.approx(found.error, rel=1e-6, abs=5e-7)


@pytest.mark.parametrize("limit", [22, 44, 77])
def test_the_iteration_knows_its_energy_and_its_residuals(limit):
    shapes = FactorShapes(12, 10, 10, 14)
    update = approximate._Update.of(random_low_rank(shapes.d, shapes.h, 3, seed=34))
    R = Rearranged.of(update.A, update.B, shapes)
    found = lanczos.block_lanczos(R, 4, limit)
    image = R.times(R.T.times(found.vectors))
    values = (image * found.vectors).sum(dim=1, keepdim=True)
    assert found.energy == pytest.approx(float(values.sum()), rel=1e-9)
    assert found.missed == pytest.approx(float((image - values * found.vectors).norm(dim=1).sum()), rel=1e-6)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(4, dtype=torch.float64))


def test_an_iteration_that_does_not_converge_gives_way_to_the_gram_matrix(monkeypatch):
    monkeypatch.setattr(lanczos, "_SMALL_SIDE", 0)
    monkeypatch.setattr(lanczos, "_TOLERANCE", 0.0)
    delta = random(64, 64, seed=23)
    found = nearest_kronecker(delta, 8, 8)
    assert found.error == pytest.approx(least_error(delta, FactorShapes(8, 8, 8, 8), 1), rel=1e-12)


@pytest.mark.parametrize(("a1", "a2"), [(4, 64), (32, 32), (64, 4), (320, 20)])
def test_structured_deltas_of_a_wide_layer_never_become_dense(a1, a2):
    for delta in (
        random_low_rank(1280, 1280, 4, seed=24),
        random_kronecker(FactorShapes(8, 8, 160, 160), 1, seed=25),
        random_kronecker(FactorShapes(40, 8, 32, 160), 2, seed=26),
    ):
        with LargestTensor() as largest:
            nearest_kronecker(delta, a1, a2)
        assert 0 < largest.elements <= 1280 * 1280 / 4


@pytest.mark.parametrize("r", [1, 4, 16, 60])
@pytest.mark.parametrize(("d", "a"), [(64, 8), (64, 2), (1280, 16)])
def test_structure_is_used_where_it_saves_multiply_adds(d, a, r):
    delta = random_low_rank(d, d, r, seed=27)
    flops = []
    for given_as in (delta, built(delta)):
        with FlopCounterMode(display=False) as counter:
            nearest_kronecker(given_as, a, a)
        flops.append(counter.get_total_flops())
    # The dense way has to build ΔW, too; r²d more are for orthonormal terms, a tenth for products with a 1 × 1 matrix.
    assert flops[0] <= 1.1 * flops[1] + 2 * r * d * (d + r)
    if (d, r) == (1280, 4):
        assert flops[0] < flops[1] / 10


def test_a_product_of_shapes_that_do_not_nest_is_cut_or_built():
    shapes = factor_shapes(60, 84, 10, 6)
    for own in (FactorShapes(6, 4, 10, 21), FactorShapes(4, 14, 15, 6), FactorShapes(3, 7, 20, 12)):
        delta = random_kronecker(own, 2, seed=28)
        expected = least_error(built(delta), shapes, 2)
        assert nearest_kronecker(delta, 10, 6, 2).error == pytest.approx(expected, rel=1e-9)
    for own, wanted, memory in (
        (FactorShapes(8, 8, 160, 160), (20, 8), 1280 * 1280 / 4),
        (FactorShapes(5, 5, 12, 12), (12, 12), 60 * 60),
    ):
        with LargestTensor() as largest:
            nearest_kronecker(random_kronecker(own, 1, seed=29), *wanted)
        assert largest.elements <= memory


@pytest.mark.parametrize("small", [0, 1])
def test_terms_beyond_the_entries_of_a_factor_are_summed_first(small):
    factors = [random(50, 32, 32, seed=35), random(50, 1, 2, seed=36)]
    delta = Kronecker(*(factors if small else reversed(factors)))
    flops = []
    for given_as in (delta, built(delta)):
        with FlopCounterMode(display=False) as counter:
            nearest_kronecker(given_as, 4, 4)
        flops.append(counter.get_total_flops())
    summing = 2 * 50 * 2 * 32 * 32
    assert flops[0] <= 1.5 * flops[1] + 2 * summing


def brute_force(delta: Delta, budget: int, num_terms: int) -> dict[tuple[int, int], tuple[float, int]]:
    """Error and parameters of all factors within a budget."""
    dense = built(delta)
    d, h = dense.shape
    costs = {f: num_terms * krona_parameters(d, h, *f) for f in legal_factors(d, h)}
    return {
        f: (least_error(dense, factor_shapes(d, h, *f), num_terms), cost) for f, cost in costs.items() if cost <= budget
    }


def assert_best(chosen: tuple[int, int], all_of_them: dict[tuple[int, int], tuple[float, int]]) -> None:
    """`chosen` has the smallest error, but for rounding, and none that surely ties with it comes before it."""
    least = min(error for error, _ in all_of_them.values())
    assert all_of_them[chosen][0] <= least + 2 * TIE
    ties = [(cost, f) for f, (error, cost) in all_of_them.items() if error <= least + TIE / 10]
    assert (all_of_them[chosen][1], chosen) <= min(ties)


@many
@given(
    d=st.sampled_from([1, 4, 6, 8, 12, 30]),
    h=st.sampled_from([1, 4, 6, 9, 12]),
    num_terms=st.integers(1, 3),
    budget=st.integers(1, 200),
    data=st.data(),
)
def test_the_chosen_factors_are_those_of_a_brute_force_search(d, h, num_terms, budget, data):
    delta = data.draw(deltas(d, h))
    all_of_them = brute_force(delta, budget, num_terms)
    assume(all_of_them)
    assert_best(choose_factors(delta, budget, num_terms), all_of_them)


@pytest.mark.parametrize("signal", [0.0, 0.02, 0.05, 0.2, 5.0])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_looking_before_solving_saves_work_and_misses_nothing(signal, num_terms, monkeypatch):
    hidden = built(random_kronecker(FactorShapes(8, 12, 24, 12), num_terms, seed=30))
    delta = random(192, 144, seed=31) + signal * hidden
    solved, nearest = [], approximate._nearest
    monkeypatch.setattr(approximate, "_nearest", lambda *args: solved.append(args[1]) or nearest(*args))
    budget = 500 * num_terms
    all_of_them = brute_force(delta, budget, num_terms)
    assert_best(choose_factors(delta, budget, num_terms), all_of_them)
    assert len(set(solved)) < len(all_of_them) / 2


@many
@given(signal=st.sampled_from([0.0, 0.05, 0.1, 1.0]), num_terms=st.integers(1, 2), seed=seeds)
def test_a_first_look_encloses_the_error(signal, num_terms, seed):
    hidden = random_kronecker(FactorShapes(8, 12, 24, 12), num_terms, seed)
    delta = random(192, 144, seed=seed + 2) + signal * built(hidden)
    shapes = FactorShapes(12, 16, 16, 9)
    low, high = approximate._error_range(approximate._Update.of(delta), shapes, num_terms)
    assert low - 1e-9 <= least_error(delta, shapes, num_terms) <= high + 1e-9
    assert low < high < low + 0.1


def test_ties_go_to_the_fewest_parameters_and_then_to_the_smallest_a1():
    ones = torch.ones(8, 8)
    # Every pair of shapes makes it; 16 parameters, (1, 8) to (8, 1), are the fewest.
    assert choose_factors(ones, 1000) == (1, 8)
    exact = random_kronecker(FactorShapes(2, 4, 4, 2), 1, seed=32)
    assert choose_factors(exact, 1000) == (2, 4)
    assert choose_factors(built(exact), 16) == (2, 4)


def test_a_budget_for_no_factors_names_the_smallest():
    delta = random(6, 10, seed=33)
    smallest = min(krona_parameters(6, 10, *f) for f in legal_factors(6, 10))
    with pytest.raises(FactorShapeError, match=rf"6 × 10 layer.*{3 * smallest - 1} parameters.*take {3 * smallest} "):
        choose_factors(delta, 3 * smallest - 1, num_terms=3)
    all_of_them = brute_force(delta, 3 * smallest, num_terms=3)
    assert_best(choose_factors(delta, 3 * smallest, num_terms=3), all_of_them)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value):
    bad = torch.ones(4, 3)
    bad[2, 1] = value
    fine = torch.ones(3, 4)
    for delta in (
        bad,
        bad.bfloat16(),
        LowRank(bad, fine),
        LowRank(fine, bad),
        LowRank(bad, torch.zeros(3, 4)),
        Kronecker(bad[None], fine[None]),
        Kronecker(fine[None], bad[None]),
        Kronecker(bad[None], torch.zeros(1, 20, 20)),
    ):
        with pytest.raises(KronAError, match="not finite"):
            nearest_kronecker(delta, 1, 1)
        with pytest.raises(KronAError, match="not finite"):
            choose_factors(delta, 1000)


@pytest.mark.parametrize(
    ("delta", "sizes"),
    [
        (torch.ones(4), r"\(4,\)"),
        (torch.ones(2, 2, 2), r"\(2, 2, 2\)"),
        (torch.ones(0, 4), r"\(0, 4\)"),
        (LowRank(torch.ones(4, 2), torch.ones(3, 4)), r"\(4, 2\) and \(3, 4\)"),
        (LowRank(torch.ones(4, 0), torch.ones(0, 4)), r"\(4, 0\) and \(0, 4\)"),
        (LowRank(torch.ones(4), torch.ones(4)), r"\(4,\) and \(4,\)"),
        (LowRank(torch.ones(4, 2), torch.ones(2)), r"\(4, 2\) and \(2,\)"),
        (Kronecker(torch.ones(2, 2), torch.ones(2, 2)), r"\(2, 2\) and \(2, 2\)"),
        (Kronecker(torch.ones(2, 2, 2), torch.ones(3, 2, 2)), r"\(2, 2, 2\) and \(3, 2, 2\)"),
    ],
)
def test_tensors_that_are_no_matrix_are_refused_with_their_shapes(delta, sizes):
    with pytest.raises(FactorShapeError, match=f"got {sizes}"):
        nearest_kronecker(delta, 1, 1)
    with pytest.raises(FactorShapeError, match=f"got {sizes}"):
        choose_factors(delta, 1000)


def test_factors_that_do_not_divide_and_counts_below_one_are_refused():
    delta = torch.ones(6, 4)
    with pytest.raises(FactorShapeError, match="a1=4 does not divide its 6 output features"):
        nearest_kronecker(delta, 4, 2)
    for a1, a2 in ((0, 2), (2, 0), (-2, 2)):
        with pytest.raises(FactorShapeError, match=f"at least 1, got {a1} and {a2}"):
            nearest_kronecker(delta, a1, a2)
    for call in (lambda: nearest_kronecker(delta, 2, 2, 0), lambda: choose_factors(delta, 100, 0)):
        with pytest.raises(KronAError, match="num_terms must be at least 1, got 0"):
            call()
