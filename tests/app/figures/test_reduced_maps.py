"""Is a large heat map that is drawn small still the same map? Each drawn cell is recomputed by plain loops."""

import numpy as np
import pytest

from depthscope.app.dashboard.components.microscope import View, _token_panels
from depthscope.app.drawing.plotly import LARGEST_SIDE
from depthscope.app.figures.build.bins import Bins, reduce_blocks
from depthscope.app.figures.build.matrix_figure import picture_figure


@pytest.mark.parametrize(("by", "of"), [("mean", np.nanmean), ("largest", np.nanmax)])
@pytest.mark.parametrize("shape", [(16, 437), (1024, 33), (299, 301), (2, 3)])
def test_each_axis_is_reduced_by_itself(by, of, shape):
    z = np.random.default_rng(0).standard_normal(shape)
    z[1, :1] = np.nan
    rows, columns = (Bins.of(np.arange(float(size)), LARGEST_SIDE) for size in shape)
    reduced = reduce_blocks(z, rows, columns, by=by)
    assert reduced.shape == tuple(min(size, LARGEST_SIDE) for size in shape)
    up, across = (np.split(np.arange(len(bins.positions)), bins.starts[1:]) for bins in (rows, columns))
    blocks = [[z[np.ix_(row, column)] for column in across] for row in up]
    expected = [[np.nan if np.isnan(each).all() else of(each) for each in row] for row in blocks]
    np.testing.assert_allclose(reduced, expected, atol=1e-14)
    np.testing.assert_array_equal(rows.centres, [row.mean() for row in up])
    np.testing.assert_array_equal(columns.centres, [column.mean() for column in across])


def test_an_infinite_number_is_not_left_out_of_a_mean():
    z = np.array([[1.0, np.inf, 2.0, np.nan]])
    (row,) = reduce_blocks(z, Bins.of(np.arange(1), 1), Bins.of(np.arange(4), 2), by="mean")
    assert row.tolist() == [np.inf, 2.0]


class _Tokens:
    """1024 tokens at 33 depths; token 700 is massive from depth 17 on, and position 5 at depth 20 alone."""

    num_depths, num_sequences, has_texts = 33, 1, True
    mask = np.ones((1, 1024), dtype=bool)

    def __init__(self) -> None:
        self.z = np.random.default_rng(2).uniform(1.0, 2.0, (1024, 33))
        self.z[700, 17:] = 3000.0
        self.z[5, 20] = 500.0

    def token_map(self, measure, sequence, stream):
        return self.z

    def texts(self, sequence):
        return [f"t{i}" for i in range(1024)]

    def quoted(self, sequence):
        return [f"“{text}”" for text in self.texts(sequence)]


@pytest.mark.parametrize("measure", ["norm", "distance"])
def test_a_long_sequence_keeps_its_depths_and_its_massive_tokens(measure):
    tokens = _Tokens()
    *massive, panel = _token_panels(tokens, View((), measure, 0, "mean", 0, None))
    shown = panel.figure.z
    assert shown.shape == (300, 33)
    assert panel.figure.x.tolist() == list(range(33))
    streak = np.flatnonzero(shown.max(axis=0) > 250.0)
    assert streak.tolist() == list(range(17, 33))  # not two depths early
    if measure == "norm":
        np.testing.assert_allclose(shown.max(axis=0), tokens.z.max(axis=0), rtol=1e-6)
        assert (shown == 500.0).sum() == 1
        row = int(np.argmax(shown[:, 30]))
        assert abs(panel.figure.y[row] - 700) <= 1.5
        (rows,) = massive  # what is massive has rows of its own
        np.testing.assert_allclose(rows.figure.z[0], tokens.z[700])
    assert "of up to 4 along position" in panel.figure.title


@pytest.mark.parametrize(("count", "every"), [(16, 1), (43, 2), (400, 10)])
def test_of_too_many_matrices_some_are_drawn_and_the_last_of_all_is_one_of_them(count, every):
    matrices = [np.full((4, 4), number / count) for number in range(count)]
    names = [f"connection {number}" for number in range(count)]
    figure = picture_figure(
        matrices, names, range(count), count, name="h", title="H", run="a", x_label="connection", of="mean"
    )
    shown = [name for name in figure.x_text if name.endswith("from 0")]
    assert shown[-1] == f"connection {count - 1}, from 0"
    assert len(shown) == -(-count // every)
    assert figure.z.shape[1] <= 300
    assert (f"1 of every {every}" in figure.title) is (every > 1)
    # Each stands where it was: its middle is inside of the places that it stands for.
    for x, name in zip(figure.x, figure.x_text, strict=True):
        if name:
            place = int(name.removeprefix("connection ").partition(",")[0])
            assert abs(x - place) < every
