import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusekrona.training.data import WIDEST, nearest, sizes_around

multiples = st.sampled_from([1, 2, 4, 8, 16, 64])


@st.composite
def buckets(draw):
    """A resolution and the multiple it is of."""
    multiple = draw(multiples)
    return multiple * draw(st.integers(1, 1536 // multiple)), multiple


@given(buckets())
def test_sides_are_multiples_aspects_at_most_two_and_areas_at_most_the_squares(bucket):
    resolution, multiple = bucket
    sizes = sizes_around(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert max(width, height) <= WIDEST * min(width, height)
        assert 0 < width * height <= resolution**2


@given(buckets())
def test_each_size_has_its_mirror_and_one_side_that_could_not_be_longer(bucket):
    resolution, multiple = bucket
    step = max(multiple, resolution // 16 // multiple * multiple)
    sizes = sizes_around(resolution, multiple)
    for width, height in sizes:
        assert (height, width) in sizes
        assert width * (height + step) > resolution**2 or height * (width + step) > resolution**2


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 8), (1024, 8), (1024, 16)])
def test_the_usual_resolutions_have_sizes_for_all_aspects(resolution, multiple):
    sizes = sizes_around(resolution, multiple)
    ratios = sorted(width / height for width, height in sizes)
    assert ratios[0] <= 0.55
    assert ratios[-1] >= 1.8
    assert max(later / earlier for earlier, later in itertools.pairwise(ratios)) < 1.2
    assert all(width * height > 0.85 * resolution**2 for width, height in sizes)


sizes_of_images = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


def stretch(one, other):
    """How many times wider one image is than the other for its height, or less wide, by cross multiplication."""
    wide = other[0] * one[1] / (other[1] * one[0])
    return max(wide, 1 / wide)


@given(sizes_of_images, st.lists(sizes_of_images, min_size=1))
def test_the_nearest_aspect_is_taken_whichever_way_the_image_lies(size, sizes):
    found = nearest(size, sizes)
    assert stretch(found, size) <= min(stretch(one, size) for one in sizes) * (1 + 1e-12)
    turned = nearest(size[::-1], [one[::-1] for one in sizes])
    assert math.isclose(stretch(turned, size[::-1]), stretch(found, size))


@given(sizes_of_images)
def test_of_equal_aspects_the_largest_is_taken(size):
    assert nearest(size, [(32, 32), (64, 64), (48, 48)]) == (64, 64)
