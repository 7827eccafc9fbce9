"""Does plotly get the figure's own numbers, typed and small?"""

import base64
import json

import numpy as np
import pytest

from depthscope.app.drawing.plotly import shrink, to_plotly
from depthscope.app.drawing.plotly.cells import log_ticks
from depthscope.app.figures import FIGURES, Heatmap, Line, Lines
from depthscope.diagnostics import analyze


@pytest.fixture(scope="module")
def both(residual_run, mhc_run):
    return {"plain": analyze(residual_run), "mhc": analyze(mhc_run)}


def decoded(values: dict) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
    return flat.reshape([int(size) for size in values["shape"].split(",")]) if "shape" in values else flat


def curves(drawn):
    return [trace for trace in drawn.data if trace.fill is None and trace.x is not None and len(trace.x) > 1]


def test_the_browser_gets_the_numbers_of_the_figure(whole):
    for name in FIGURES:
        figure = FIGURES[name].build(whole)
        spec = json.loads(to_plotly(figure).to_json())
        if isinstance(figure, Heatmap):
            sent = decoded(spec["data"][0]["customdata" if figure.log_z else "z"])
            np.testing.assert_array_equal(sent, figure.z.astype(np.float32))
        else:
            sent = [decoded(t["y"]) for t in spec["data"] if "bdata" in str(t.get("y")) and "fill" not in t]
            assert len(sent) == len(figure.lines)
            for values, line in zip(sent, figure.lines, strict=True):
                np.testing.assert_array_equal(values, line.y)


def test_a_null_is_dashed_in_the_colour_of_its_run(both):
    drawn = curves(to_plotly(FIGURES["effective_rank"].build(both)))
    nulls = [trace for trace in drawn if trace.name.endswith("noise baseline")]
    assert [trace.line.dash for trace in nulls] == ["dash", "dash"]
    measured = [trace for trace in drawn if trace.line.dash in (None, "solid")]
    assert {trace.line.color for trace in nulls} == {trace.line.color for trace in measured}
    assert len({trace.line.color for trace in nulls}) == 2


@pytest.mark.parametrize(("low", "high"), [(-5.6, -5.2), (0.0, 0.005), (2.0, 4.0), (-0.3, 0.3), (-3.0, -1.5)])
@pytest.mark.parametrize("most", [3, 6])
def test_a_logarithmic_axis_has_a_few_ticks_that_are_numbers_in_full(low, high, most):
    ticks = log_ticks(low, high, most)
    values = np.array(ticks["tickvals"])
    assert 2 <= len(values) <= most
    assert (np.log10(values) >= low - 1e-6).all()
    assert (np.log10(values) <= high + 1e-6).all()
    np.testing.assert_allclose([float(name) for name in ticks["ticktext"]], values, rtol=1e-5)


def test_a_band_leaves_out_what_a_log_axis_cannot_show():
    x = np.arange(3.0)
    line = Line(x, np.full(3, 2.0), "a", lower=np.array([-1.0, 1.0, 1.0]), upper=np.full(3, 3.0))
    drawn = to_plotly(Lines("rank", "Rank", "x", "y", (line,), log_y=True))
    assert drawn.data[0].x.tolist() == [1.0, 2.0, 2.0, 1.0]
    assert drawn.data[0].y.tolist() == [3.0, 3.0, 1.0, 1.0]


def test_many_lines_get_a_legend_of_runs_and_of_variants(both):
    runs = {"a": both["mhc"], "b": both["mhc"]}
    drawn = to_plotly(FIGURES["mixing_singular_value"].build(runs))
    named = [trace.name for trace in drawn.data if trace.showlegend is not False]
    assert named == ["a", "b", "σ1", "σ2", "σ3", "σ4"]


def square(size: int, **more) -> Heatmap:
    axis = np.arange(size, dtype=float)
    z = np.add.outer(axis, axis)
    return Heatmap("cka", "CKA", axis, axis, z, "depth", "depth", "cka", **more)


def test_a_large_heat_map_is_reduced_by_blocks_and_says_so():
    small = shrink(square(700))
    assert small.z.shape == (300, 300)
    assert small.z[0, 0] == np.add.outer(range(2), range(2)).mean()
    assert small.x[1] == 2.5  # the middle of 2 and 3
    assert "each cell is the mean of up to 3 along depth by 3 along depth" in small.caption
    assert len(to_plotly(square(700)).to_json()) < 550_000  # 300² numbers of float32 in base64, and the axes


@pytest.mark.parametrize("known", [False, True])
def test_a_chart_of_nothing_says_so(known):
    values = np.full(3, 2.0 if known else np.nan)
    line = Lines("rank", "Rank", "depth", "rank", (Line(np.arange(3.0), values, "a"),))
    cells = Heatmap("map", "Map", np.arange(3.0), np.arange(3.0), np.tile(values, (3, 1)), "x", "y", "z")
    for figure in (line, cells):
        said = [each.text for each in to_plotly(figure).layout.annotations]
        assert ("undefined everywhere" in said) is not known
