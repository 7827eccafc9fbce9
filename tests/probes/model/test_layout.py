"""A layout names the axes of a state; a state that fits none is refused."""

from __future__ import annotations

import pytest
import torch

from depthscope import LayoutError
from depthscope.probes.model.layout import canonical, count_streams, parse_layout


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("B T N D", (2, 3, 4, 5)),
        ("N B T D", (4, 2, 3, 5)),
        ("(B N) T D", (8, 3, 5)),
        ("B T (N D)", (2, 3, 20)),
        ("T B (N D)", (3, 2, 20)),
    ],
)
def test_every_layout_comes_to_the_same_state(layout, shape):
    state = torch.randn(2, 3, 4, 5)  # B T N D
    letters = [letter for group in parse_layout(layout) for letter in group]
    held = state.permute(["BTND".index(letter) for letter in letters]).reshape(shape)
    assert torch.equal(canonical(held, layout, batch_size=2, num_streams=4), state)


def test_an_image_becomes_tokens():
    image = torch.randn(2, 5, 3, 4)
    state = canonical(image, "B D H W", batch_size=2, num_streams=1)
    assert state.shape == (2, 12, 1, 5)
    assert torch.equal(state[:, 4 * 1 + 2, 0], image[:, :, 1, 2])


def test_states_without_streams_or_tokens_get_axes_of_size_one():
    assert canonical(torch.randn(2, 5), "B D", batch_size=2, num_streams=1).shape == (2, 1, 1, 5)


@pytest.mark.parametrize("layout", ["B T", "B T T D", "B X D", ""])
def test_unreadable_layouts_are_refused(layout):
    with pytest.raises(LayoutError, match="cannot be read"):
        parse_layout(layout)


def test_layouts_that_do_not_fit_are_refused():
    with pytest.raises(LayoutError, match="has 3 axes"):
        canonical(torch.randn(2, 3), "B T D", batch_size=2, num_streams=1)
    with pytest.raises(LayoutError, match="does not fit"):
        canonical(torch.randn(7, 3, 5), "(B N) T D", batch_size=2, num_streams=4)


def test_streams_are_counted_from_the_layout():
    assert count_streams((2, 3, 4, 5), "B T N D", 2) == 4
    assert count_streams((8, 3, 5), "(B N) T D", 2) == 4
    assert count_streams((2, 3, 5), "B T D", 2) == 1


def test_a_count_that_is_not_in_the_state_is_refused():
    assert count_streams((2, 3, 12), "B T (N D)", 2, asserted=4) == 4
    assert count_streams((2, 3, 4, 5), "B T N D", 2, asserted=4) == 4
    for shape, layout in [((2, 3, 12), "B T D"), ((2, 3, 4, 5), "B T N D"), ((8, 3, 5), "(B N) T D")]:
        with pytest.raises(LayoutError, match="got streams=3, but a state of shape"):
            count_streams(shape, layout, 2, asserted=3)
