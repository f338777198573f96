"""merge_ and unmerge_: the sum rounded once, and the old weight back bit for bit, whatever was added."""

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusekrona.errors import MergeError
from diffusekrona.kron import exact
from diffusekrona.kron.exact import Term, arithmetic_dtype, check_mergeable, fold_, merge_, unmerge_

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

many = settings(deadline=None, max_examples=150)

sides = st.sampled_from([1, 2, 3, 5, 8])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
seeds = st.integers(0, 2**31)
update_sizes = st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 10.0])
chunk_sizes = st.sampled_from([1, 7, 64, 500, 1 << 20])


def plain(values: Tensor) -> Tensor:
    return values.clone()


def transposed(values: Tensor) -> Tensor:
    return values.T.contiguous().T


def columns_of_a_wider_one(values: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(values), values, torch.ones_like(values)], dim=1)[
        :, values.shape[1] : 2 * values.shape[1]
    ]


def every_other_row(values: Tensor) -> Tensor:
    return torch.stack([values, torch.ones_like(values)], dim=1)[:, 0]


layouts = st.sampled_from([plain, transposed, columns_of_a_wider_one, every_other_row])


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(INTEGERS[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def chunks_of(entries: int):
    return mock.patch.object(exact, "_CHUNK_ENTRIES", entries)


def difficult_weight(d: int, h: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Ordinary weights among signed zeros, subnormal numbers, tiny ones, and quarters of the range."""
    torch.manual_seed(seed)
    ordinary = torch.randn(d, h, dtype=torch.float64) * 0.03
    limits = torch.finfo(dtype)
    specials = [
        0.0,
        -0.0,
        limits.smallest_normal,
        -limits.smallest_normal,
        limits.smallest_normal * limits.eps,
    ]
    specials += [limits.smallest_normal / 2, limits.max / 4, -limits.max / 4, 1.0, -1.0]
    chosen = torch.tensor(specials, dtype=torch.float64)[torch.randint(len(specials), (d, h))]
    return torch.where(torch.rand(d, h) < 0.3, chosen, ordinary).to(dtype)


@st.composite
def merges(draw: st.DrawFn) -> tuple[Tensor, list[Term]]:
    """A weight, in any layout, and one to three terms that fit it."""
    a1, b1, a2, b2 = (draw(sides) for _ in range(4))
    d, h = a1 * b1, a2 * b2
    dtype = draw(dtypes)
    weight = draw(layouts)(difficult_weight(d, h, dtype, draw(seeds)))
    terms = []
    kinds = st.tuples(st.booleans(), update_sizes, st.sampled_from(["kron", "transposed"]))
    for swapped, size, layout in draw(st.lists(kinds, min_size=1, max_size=3)):
        shapes = ((b1, b2), (a1, a2)) if swapped else ((a1, a2), (b1, b2))
        A, B = (torch.randn(shape, dtype=arithmetic_dtype(dtype)) for shape in shapes)
        terms.append(Term(A * size, B, layout))
    return weight, terms


def dense(term: Term) -> Tensor:
    """A ⊗ B, with its rows in the layout's order."""
    product = torch.kron(term.A, term.B)
    if term.layout == "kron":
        return product
    i, k = torch.meshgrid(torch.arange(len(term.A)), torch.arange(len(term.B)), indexing="ij")
    reordered = torch.empty_like(product)
    reordered[(k * len(term.A) + i).flatten()] = product
    return reordered


def rounded_sum(weight: Tensor, terms: list[Term]) -> Tensor:
    """weight + Σ A ⊗ B, densely: the updates summed in their order, then the weight, then one rounding."""
    delta = dense(terms[0])
    for term in terms[1:]:
        delta = delta + dense(term)
    return (delta + weight.to(delta.dtype)).to(weight.dtype)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float8_e4m3fn, torch.float32),
    ],
)
def test_updates_are_computed_in_fp32_or_the_weights_own_wider_dtype(dtype, expected):
    assert arithmetic_dtype(dtype) == expected


@many
@given(merge=merges(), entries=chunk_sizes)
def test_merging_rounds_the_sum_once_and_unmerging_gives_back_every_bit(merge, entries):
    weight, terms = merge
    before, memory = weight.clone(), (weight.data_ptr(), weight.stride())
    kept = [(A.clone(), B.clone()) for A, B, _ in terms]
    with chunks_of(entries):
        restoration = merge_(weight, terms)
        assert same_bits(weight, rounded_sum(before, terms))
        unmerge_(weight, terms, restoration)
    assert same_bits(weight, before)
    assert (weight.data_ptr(), weight.stride()) == memory
    assert all(torch.equal(a, b) for old, new in zip(kept, terms, strict=True) for a, b in zip(old, new, strict=False))


@many
@given(merge=merges(), entries=chunk_sizes, keep=st.sampled_from(["entries", "copy", "nothing"]))
def test_merging_gives_the_same_bits_whatever_it_keeps(merge, entries, keep):
    weight, terms = merge
    before, memory = weight.clone(), (weight.data_ptr(), weight.stride())
    with chunks_of(entries):
        restoration = merge_(weight, terms, keep)
        assert same_bits(weight, rounded_sum(before, terms))
        assert restoration.keep == keep
        assert keep == "entries" or restoration.nbytes == (weight.nbytes if keep == "copy" else 0)
        unmerge_(weight, terms, restoration)
    if keep != "nothing":
        assert same_bits(weight, before)
    assert (weight.data_ptr(), weight.stride()) == memory


@many
@given(merge=merges(), entries=chunk_sizes)
def test_what_was_merged_without_keeping_anything_comes_out_to_rounding(merge, entries):
    weight, terms = merge
    before, dtype = weight.double(), weight.dtype
    deltas = [dense(Term(A.double(), B.double(), layout)) for A, B, layout in terms]
    merged = before + sum(deltas)
    largest = before.abs() + sum(delta.abs() for delta in deltas)
    with chunks_of(entries):
        unmerge_(weight, terms, merge_(weight, terms, "nothing"))
    two_roundings = torch.finfo(dtype).eps * (merged.abs() + before.abs())
    arithmetic = 4 * (len(terms) + 2) * torch.finfo(arithmetic_dtype(dtype)).eps * largest
    smallest = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(((weight.double() - before).abs() <= two_roundings + arithmetic + smallest).all())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("entries", [0, 1, 8, 63, 64, 1000, 4096])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.05, 0.5, 1.0])
def test_the_search_finds_what_is_not_zero_in_order(dtype, entries, share):
    generator = torch.Generator().manual_seed(0)
    differs = torch.randint(-(1 << 14), 1 << 14, (entries,), generator=generator).to(dtype) * 2 + 1
    differs[torch.rand(entries, generator=generator) >= share] = 0
    found = exact._where(differs, torch.ones(entries, dtype=torch.bool))
    assert torch.equal(found, differs.nonzero().squeeze(-1))


@many
@given(merge=merges(), entries=chunk_sizes)
def test_folding_gives_the_same_bits_as_merging(merge, entries):
    weight, terms = merge
    merged, memory = weight.clone(), (weight.data_ptr(), weight.stride())
    merge_(merged, terms)
    with chunks_of(entries):
        fold_(weight, terms)
    assert same_bits(weight, merged)
    assert (weight.data_ptr(), weight.stride()) == memory


@many
@given(merge=merges())
def test_the_merged_weight_is_the_float64_sum_to_its_own_rounding(merge):
    weight, terms = merge
    deltas = [dense(Term(A.double(), B.double(), layout)) for A, B, layout in terms]
    exactly = weight.double() + sum(deltas)
    largest = weight.double().abs() + sum(delta.abs() for delta in deltas)
    dtype = weight.dtype
    merge_(weight, terms)
    half_a_unit = exactly.abs() * torch.finfo(dtype).eps / 2
    arithmetic = (len(terms) + 2) * torch.finfo(arithmetic_dtype(dtype)).eps * largest
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(((weight.double() - exactly).abs() <= half_a_unit + 2 * arithmetic + smallest).all())


@many
@given(merge=merges(), entries=chunk_sizes)
def test_chunking_changes_neither_bits_nor_what_is_kept(merge, entries):
    weight, terms = merge
    other = weight.clone()
    with chunks_of(1 << 20):
        whole = merge_(weight, terms)
    with chunks_of(entries):
        parts = merge_(other, terms)
    assert same_bits(weight, other)
    if len(whole.chunks) == len(parts.chunks):
        assert whole.nbytes == parts.nbytes


@many
@given(merge=merges(), entries=chunk_sizes)
def test_what_is_kept_is_never_larger_than_the_weight_and_is_counted_right(merge, entries):
    weight, terms = merge
    with chunks_of(entries):
        restoration = merge_(weight, terms)
    assert restoration.nbytes <= weight.nbytes
    tensors = [t for chunk in restoration.chunks for t in chunk if t is not None]
    assert restoration.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    assert restoration.entries == sum(values.numel() for _, values in restoration.chunks) <= weight.numel()
    assert restoration.dtype == weight.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("entries", [1000, 1 << 20])
def test_a_layer_sized_weight_comes_back_bit_for_bit_for_every_size_of_update(dtype, size, entries):
    torch.manual_seed(0)
    before = (torch.randn(160, 128, dtype=torch.float64) * 0.03).to(dtype)
    terms = [
        Term(
            torch.randn(4, 64).to(arithmetic_dtype(dtype)) * size,
            torch.randn(40, 2).to(arithmetic_dtype(dtype)),
        ),
        Term(
            torch.randn(8, 16).to(arithmetic_dtype(dtype)) * size,
            torch.randn(20, 8).to(arithmetic_dtype(dtype)),
        ),
    ]
    weight = before.clone()
    with chunks_of(entries):
        restoration = merge_(weight, terms)
        assert same_bits(weight, rounded_sum(before, terms))
        unmerge_(weight, terms, restoration)
    assert same_bits(weight, before)


def test_plain_subtraction_would_not_restore_what_unmerging_restores():
    torch.manual_seed(0)
    before = (torch.randn(256, 256) * 0.03).bfloat16()
    term = Term(torch.randn(4, 64) * 1e-2, torch.randn(64, 4))
    weight = before.clone()
    restoration = merge_(weight, [term])
    subtracted = (weight.float() - dense(term)).bfloat16()
    assert not same_bits(subtracted, before)
    assert restoration.entries >= int((subtracted != before).sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_typical_merge_keeps_less_than_two_percent_of_the_weight(dtype):
    """Weights of standard deviation 0.03 and an update of 1e-4, as after fine-tuning an attention layer."""
    torch.manual_seed(0)
    before = (torch.randn(640, 640) * 0.03).to(dtype)
    A = torch.randn(4, 64)
    terms = [Term(A * 1e-4, torch.randn(160, 10))]
    assert float(dense(terms[0]).std()) == pytest.approx(1e-4, rel=0.1)
    weight = before.clone()
    restoration = merge_(weight, terms)
    assert not same_bits(weight, before)
    assert 0 < restoration.nbytes < 0.02 * weight.nbytes


def test_an_update_that_destroys_most_entries_keeps_no_more_than_the_weight():
    torch.manual_seed(0)
    before = torch.randn(64, 64).bfloat16() * 1e-3
    terms = [Term(torch.full((8, 8), 1000.0), torch.randn(8, 8))]
    weight = before.clone()
    restoration = merge_(weight, terms)
    assert restoration.nbytes == weight.nbytes
    assert restoration.entries == weight.numel()
    unmerge_(weight, terms, restoration)
    assert same_bits(weight, before)


@pytest.mark.parametrize("size", [(0, 6), (6, 0)])
def test_a_weight_without_entries_is_merged_and_unmerged(size):
    weight = torch.zeros(size)
    terms = [Term(torch.ones(size[0] and 2, size[1] and 2), torch.ones(3, 3))]
    check_mergeable(weight, terms)
    restoration = merge_(weight, terms)
    assert restoration.nbytes == 0
    unmerge_(weight, terms, restoration)
    assert weight.shape == size


def layer_and_update(size: int, seed: int) -> tuple[Tensor, list[Term]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator, dtype=torch.float32).bfloat16()
    return weight, [Term(torch.randn(4, 4, generator=generator) * 1e-2, torch.randn(size // 4, size // 4))]


def test_a_merge_in_inference_mode_leaves_later_ones_outside_of_it_alone():
    with mock.patch.object(exact, "_space", exact._Space()):
        for context in (torch.inference_mode, torch.no_grad):
            weight, terms = layer_and_update(16, seed=3)
            before = weight.clone()
            with context():
                unmerge_(weight, terms, merge_(weight, terms))
            assert same_bits(weight, before)


def test_threads_do_not_compute_in_each_others_memory():
    layers = [layer_and_update(256, seed) for seed in range(8)]
    expected = [weight.clone() for weight, _ in layers]
    for weight, terms in zip(expected, [terms for _, terms in layers], strict=True):
        merge_(weight, terms)
    with chunks_of(1024), ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            before = [weight.clone() for weight, _ in layers]
            kept = list(pool.map(lambda layer: merge_(*layer), layers))
            assert all(same_bits(weight, merged) for (weight, _), merged in zip(layers, expected, strict=True))
            list(pool.map(lambda layer, restoration: unmerge_(*layer, restoration), layers, kept))
            assert all(same_bits(weight, old) for (weight, _), old in zip(layers, before, strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the most bytes that a freshly allocated result of any operation takes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.storage, self.bytes = weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self.storage:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_no_temporary_of_merging_or_unmerging_is_as_large_as_the_weight():
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    terms = [
        Term(torch.randn(8, 8) * 1e-3, torch.randn(8, 8)),
        Term(torch.randn(4, 4), torch.randn(16, 16), "transposed"),
    ]
    with chunks_of(128), mock.patch.object(exact, "_space", exact._Space()), LargestTensor(weight) as largest:
        unmerge_(weight, terms, merge_(weight, terms))
        fold_(weight, terms)
    # An index takes 8 bytes, twice an entry of this weight.
    assert 0 < largest.bytes <= 2 * 128 * weight.element_size() < weight.nbytes


def unchanged_and_refused(weight: Tensor, terms: list[Term]) -> None:
    before = weight.clone()
    with pytest.raises(MergeError, match="infinity or a NaN"):
        check_mergeable(weight, terms)
    assert same_bits(weight, before)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["A", "B", "weight"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("other", [0.0, 1.0])
def test_one_entry_that_is_not_finite_refuses_the_merge_and_changes_nothing(value, where, dtype, other):
    weight = torch.full((6, 6), other, dtype=dtype)
    A, B = (torch.full(size, other, dtype=arithmetic_dtype(dtype)) for size in ((2, 3), (3, 2)))
    {"A": A, "B": B, "weight": weight}[where][-1, -1] = value
    for entries in (7, 1 << 20):
        with chunks_of(entries):
            unchanged_and_refused(weight, [Term(A, B)])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_fp16_is_refused_exactly_where_rounding_reaches_infinity(sign):
    """fp16 ends at 65504; the next step would be 65536, so sums from 65520 on round to infinity."""
    weight = torch.full((4, 4), sign * 65504.0, dtype=torch.float16)

    def term(update: float) -> list[Term]:
        A = torch.zeros(2, 2)
        A[-1, -1] = sign * update
        return [Term(A, torch.ones(2, 2))]

    check_mergeable(weight, term(15.0))
    check_mergeable(weight, term(-65504.0))
    unchanged_and_refused(weight, term(16.0))


def test_an_overflow_of_the_arithmetic_itself_is_refused():
    weight = torch.zeros(4, 4)
    large = torch.full((2, 2), 1e30)
    unchanged_and_refused(weight, [Term(large, large)])
    # Each term fits, their sum does not; and what overflows on the way stays an infinity.
    half = [Term(torch.full((2, 2), 1e19), torch.full((2, 2), 2e19))]
    check_mergeable(weight, half)
    unchanged_and_refused(weight, half * 2)


@many
@given(merge=merges(), entries=chunk_sizes, scale=st.sampled_from([1.0, 1e2, 1e4, 1e5, 1e19, 1e38]))
def test_a_merge_is_refused_exactly_when_its_result_is_not_finite(merge, entries, scale):
    weight, terms = merge
    terms = [Term(A * scale, B, layout) for A, B, layout in terms]
    finite = bool(torch.isfinite(rounded_sum(weight, terms)).all())
    before = weight.clone()
    with chunks_of(entries):
        if finite:
            check_mergeable(weight, terms)
        else:
            with pytest.raises(MergeError):
                check_mergeable(weight, terms)
    assert same_bits(weight, before)
