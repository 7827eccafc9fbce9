"""Do numbers along the axes say the same as the numbers of all elements?"""

from __future__ import annotations

import numpy as np
import pytest

from depthscope.probes.reading.numbers import Numbers, joined

FIRST = Numbers.first((3, 4, 6))
ALL = np.arange(72).reshape(3, 4, 6)


@pytest.mark.parametrize(
    "shape", [(12, 6), (3, 24), (3, 4, 2, 3), (72,), (1, 3, 4, 6, 1), (6, 12), (3, 2, 2, 6), (2, 36)]
)
def test_a_view_has_the_numbers_in_another_shape(shape):
    found = FIRST.reshape(shape)

    np.testing.assert_array_equal(found.dense(), ALL.reshape(shape))
    assert found.array is None  # nothing of the value's size was kept


@pytest.mark.parametrize("shape", [(12, 5, 6), (12, 30), (3, 4, 30), (60, 6)])
def test_streams_are_folded_into_any_axis(shape):
    streams = FIRST.reshape((3, 4, 1, 6)).expand((3, 4, 5, 6))

    np.testing.assert_array_equal(streams.reshape(shape).dense(), streams.dense().reshape(shape))
    assert (streams.count, streams.distinct) == (360, 72)


def test_pieces_that_are_joined_again_are_the_whole():
    pieces = [FIRST.take(1, slice(start, start + 2)) for start in (0, 2)]

    assert joined(pieces, 1).key == FIRST.key
    np.testing.assert_array_equal(FIRST.permute((2, 0, 1)).dense(), ALL.transpose(2, 0, 1))


def test_different_elements_do_not_agree_and_padding_agrees_with_all():
    padded = Numbers.of(np.where(ALL % 6 < 3, ALL, -1))

    assert FIRST.agreed(padded).key == FIRST.key
    assert FIRST.agreed(Numbers.of(np.roll(ALL, 1, 1))) is None
    assert FIRST.collapsed([1]) is None


def test_numbers_that_are_no_sum_over_axes_are_held_as_they_are():
    shuffled = np.random.default_rng(0).permutation(72).reshape(3, 4, 6)

    found = Numbers.of(shuffled)

    assert found.array is not None
    np.testing.assert_array_equal(found.reshape((12, 6)).dense(), shuffled.reshape(12, 6))
