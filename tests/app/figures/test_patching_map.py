"""The map of a patch shows the cells of its result, and says what they are."""

from __future__ import annotations

import numpy as np
import pytest

import depthscope as ds
from depthscope.app.drawing.plotly import to_plotly
from depthscope.app.figures.build.patching_map import patching_map
from tests.probes.interventions.local_streams import LocalStreams, ids


@pytest.fixture(scope="module")
def result():
    clean, corrupted = ids(1, 4), ids(1, 4)
    corrupted[:, 1] = (corrupted[:, 1] + 1) % 7
    text = [["a", "b", "$", "d"]]
    return ds.interventions.patch(
        LocalStreams(layers=2).eval(),
        clean,
        corrupted,
        sites=["residual", "h_res"],
        answer=3,
        against=7,
        token_text=text,
    )


def test_cells_are_those_of_the_result(result):
    figure = patching_map(result)
    np.testing.assert_array_equal(figure.z, result.effect.sel(site="residual", stream=-1))
    assert figure.x_names == ("0 a", "1 b", "2 $", "3 d")
    assert figure.limits[0] <= 0 < 1 <= figure.limits[1]
    assert "logit(answer) − logit(against)" in figure.caption
    mixing = patching_map(result, site="h_res", stream=1, value="change")
    np.testing.assert_array_equal(
        mixing.z, result.change.sel(site="h_res", stream=1)[1:]
    )  # no connection ends at depth 0
    assert mixing.diverging
    assert "H_res, stream 1" in mixing.title
    assert to_plotly(mixing).data


def test_it_is_drawn_and_what_it_lacks_is_refused(result, tmp_path):
    drawn = ds.figures.patching(result, venue="icml")
    assert [text.get_text() for text in drawn.axes[0].get_xticklabels()] == ["0 a", "1 b", r"2 \$", "3 d"]
    saved = ds.interventions.save_result(result, tmp_path / "a.zip")
    assert ds.figures.patching(saved, site="h_res").axes
    with pytest.raises(ValueError, match="no site 'h_pre' was patched"):
        ds.figures.patching(result, site="h_pre")
    with pytest.raises(ValueError, match="stream 5 was not patched"):
        ds.figures.patching(result, stream=5)
    effects = ds.interventions.ablate(LocalStreams(layers=2).eval(), ids(2, 4), "skip")
    with pytest.raises(ValueError, match=r"expected a result of depthscope\.interventions\.patch"):
        ds.figures.patching(effects)
