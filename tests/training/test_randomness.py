from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from diffusekrona.training.randomness import Order, generator_for, seed_for

kinds_of_images = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12)
batch_sizes = st.integers(1, 20)
purposes = st.lists(st.integers() | st.text(), max_size=3).map(tuple)


def order(kinds, batch_size=2, seed=0, name="subject"):
    return Order(kinds, batch_size, seed, name)


def draws(kinds, batch_size, batches, **options):
    """All draws of the first batches."""
    source = order(kinds, batch_size, **options)
    return [draw for number in range(batches) for draw in source.batch(number)]


def by_kind(kinds, drawn):
    """The draws of each kind, in their order."""
    return {kind: [draw for draw in drawn if kinds[draw.index] == kind] for kind in kinds}


@given(st.integers(), st.integers(), purposes, purposes)
def test_each_purpose_has_a_seed_of_its_own(seed, other, purpose, another):
    assert seed_for(seed, *purpose) == seed_for(seed, *purpose)
    assert 0 <= seed_for(seed, *purpose) < 2**64
    assert (seed_for(seed, *purpose) == seed_for(other, *another)) == ((seed, purpose) == (other, another))


def test_a_number_is_another_purpose_than_its_digits_and_two_are_others_than_one():
    purposes = [("a", 1), ("a", "1"), ("a1",), ("a", 1, 1), ("a", 11), (1, "a")]
    assert len({seed_for(0, *purpose) for purpose in purposes}) == len(purposes)


def test_a_generator_draws_what_its_seed_and_purpose_say():
    first, again, other = (generator_for(0, *purpose) for purpose in (("a", 1), ("a", 1), ("a", 2)))
    assert first.initial_seed() == again.initial_seed() != other.initial_seed()


@given(kinds_of_images, batch_sizes, st.integers(0, 99))
def test_as_many_batches_as_there_are_images_use_each_as_often_as_any_other(kinds, batch_size, seed):
    used = Counter(draw.index for draw in draws(kinds, batch_size, len(kinds), seed=seed))
    assert used == dict.fromkeys(range(len(kinds)), batch_size)


@given(kinds_of_images, batch_sizes, st.integers(1, 30))
def test_at_any_time_images_of_a_kind_are_used_equally_often_but_for_once(kinds, batch_size, batches):
    used = Counter(draw.index for draw in draws(kinds, batch_size, batches))
    for kind in set(kinds):
        counts = [used[index] for index, one in enumerate(kinds) if one == kind]
        assert max(counts) - min(counts) <= 1


@given(kinds_of_images, batch_sizes, st.integers(0, 30))
def test_a_batch_is_of_one_kind_and_full(kinds, batch_size, number):
    batch = order(kinds, batch_size).batch(number)
    assert len(batch) == batch_size
    assert len({kinds[draw.index] for draw in batch}) == 1


@given(kinds_of_images, batch_sizes, batch_sizes, st.integers(1, 12))
def test_which_image_comes_when_and_with_which_noise_does_not_depend_on_the_batch_size(kinds, first, second, batches):
    """So any number of processes, which divide batches among them, draw what one process with their batches would."""
    some, others = (by_kind(kinds, draws(kinds, size, batches)) for size in (first, second))
    for kind, drawn in some.items():
        both = min(len(drawn), len(others[kind]))
        assert drawn[:both] == others[kind][:both]


@given(kinds_of_images, batch_sizes, st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_a_batch_is_the_same_whatever_was_asked_before(kinds, batch_size, numbers):
    source = order(kinds, batch_size)
    asked = [source.batch(number) for number in numbers]
    assert asked == [order(kinds, batch_size).batch(number) for number in numbers]


@given(kinds_of_images, batch_sizes, st.integers(1, 20))
def test_no_two_draws_of_a_run_have_the_same_place(kinds, batch_size, batches):
    drawn = draws(kinds, batch_size, batches) + draws(kinds, batch_size, batches, name="class")
    assert len({draw.place for draw in drawn}) == len(drawn)


def test_seeds_and_names_have_orders_of_their_own_and_passes_differ():
    first = [draw.index for draw in draws("a" * 20, 20, 3)]
    assert first[:20] != first[20:40] != first[40:]
    for other in ({"seed": 1}, {"name": "class"}):
        assert [draw.index for draw in draws("a" * 20, 20, 3, **other)] != first
