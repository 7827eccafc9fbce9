"""Does matplotlib draw the figure's own numbers, in the size and the files that a venue asks for?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib import ft2font

from depthscope.app.drawing.matplotlib import WIDTHS, to_matplotlib, write_figure
from depthscope.app.drawing.matplotlib.style import FONTS, can_draw
from depthscope.app.figures import Heatmap, Line, Lines
from depthscope.app.figures.build.bins import edges
from tests.app.example_figures import CURVES, MAP, X


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("figure", [CURVES, MAP], ids=["curves", "map"])
def test_figures_have_the_width_of_the_venue(figure, width):
    assert to_matplotlib(figure, width=width).get_size_inches()[0] == WIDTHS[width].inches


def test_curves_draw_the_numbers_of_the_specification():
    axes = to_matplotlib(CURVES).axes[0]
    drawn = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_array_equal(drawn["a"].get_ydata(), CURVES.lines[0].y)
    np.testing.assert_array_equal(
        drawn[r"cost \$5_a"].get_ydata() if r"cost \$5_a" in drawn else drawn["cost $5_a"].get_ydata(),
        CURVES.lines[2].y,
    )
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[1] < 1e6  # a far threshold does not flatten the curves


def test_names_of_near_thresholds_do_not_cover_one_another():
    heights = (0.95, 0.96, 0.97)
    lines = [Line(X[[0, -1]], np.full(2, y), f"limit {y}", role="threshold") for y in heights]
    curve = replace(CURVES.lines[0], y=X / X.max(), lower=None, upper=None)
    figure = replace(CURVES, log_y=False, healthy=None, lines=(curve, *lines))
    drawn = to_matplotlib(figure)
    drawn.draw_without_rendering()
    boxes = [text.get_window_extent() for text in drawn.axes[0].texts]
    assert 0 < len(boxes) < len(heights)  # others are in the legend
    assert not any(one.overlaps(other) for one in boxes for other in boxes if one is not other)


def test_null_is_dashed_in_the_colour_of_its_run():
    lines = to_matplotlib(CURVES).axes[0].get_lines()
    assert lines[1].get_color() == lines[0].get_color() != lines[2].get_color()
    assert lines[1].get_linestyle() == "--"


def test_map_draws_the_numbers_and_centres_zero():
    mesh = to_matplotlib(MAP).axes[0].collections[0]
    np.testing.assert_allclose(mesh.get_array(), MAP.z)
    assert mesh.norm.vmin == -mesh.norm.vmax


def test_dense_maps_are_rasterised_inside_the_vector_file(tmp_path):
    size = np.arange(60.0)
    dense = Heatmap("dense", "D", size, size, np.add.outer(size, size), "x", "y", "z")
    write_figure(dense, tmp_path / "d.pdf", tmp_path / "d.svg")
    assert b"/Subtype /Image" in (tmp_path / "d.pdf").read_bytes()
    assert (tmp_path / "d.svg").read_text().count("<path") < 500


def test_empty_and_single_values_are_drawn(tmp_path):
    nothing = Lines("n", "N", "x", "y", (Line(X, np.full(8, np.nan), "a"),), log_y=True)
    one = Heatmap("o", "O", np.array([3.0]), np.array([0.0]), np.array([[np.nan]]), "x", "y", "z", log_z=True)
    zeros = Lines("z", "Z", "x", "y", (Line(X, 0 * X, "a", lower=0 * X, upper=0 * X),), log_y=True)
    write_figure(nothing, tmp_path / "n.pdf")
    write_figure(zeros, tmp_path / "z.pdf")
    write_figure(one, tmp_path / "o.pdf")
    assert edges(np.array([3.0])).tolist() == [2.5, 3.5]


@pytest.mark.parametrize("bad", [{"width": "a4"}, {"path": "f.gif"}])
def test_unknown_width_or_format_is_refused(bad, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        write_figure(CURVES, tmp_path / bad.get("path", "f.pdf"), width=bad.get("width", "icml"))


def test_many_lines_of_many_runs_are_named_by_run_and_by_variant(tmp_path):
    runs = [f"run-{place} " + "words " * 8 for place in range(14)]
    lines = [Line(X, X + 1, f"{run} · depth {depth}", group=run) for run in runs for depth in (0, 4)]
    canvas = to_matplotlib(Lines("many", "Title", "x", "y", tuple(lines)), width="icml")
    (legend,) = canvas.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == 16
    assert labels[14:] == ["depth 0", "depth 4"]
    assert [label[: len("run-0")] for label in labels[:2]] == ["run-0", "run-1"]
    assert canvas.get_size_inches()[1] < 5


def test_letters_are_drawn_by_a_font_that_has_them_or_escaped():
    assert not any(map(can_draw, "\u200d\ue000\U0010ffff"))  # a joiner, a letter of private use, none
    assert all(map(can_draw, "aπл"))
    assert can_draw("\u0634") == hasattr(ft2font, "__libraqm_version__")  # its form depends on its neighbours
    (axes,) = to_matplotlib(replace(CURVES, x_label="模型 \ue000")).axes
    assert axes.xaxis.label.get_text() == r"\u6a21\u578b \ue000"
    assert axes.yaxis.label.get_fontfamily() == list(FONTS)
