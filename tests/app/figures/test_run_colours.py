"""Does a run keep its colour, on the screen and on paper?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import xarray as xr
from matplotlib.colors import to_hex

from depthscope.app.drawing.matplotlib import curves, to_matplotlib
from depthscope.app.drawing.plotly import to_plotly
from depthscope.app.figures import FIGURES, Selection
from depthscope.app.figures.composed import compose
from depthscope.app.figures.palette import MARK_EDGE, RUN_COLOURS, colour_numbers
from depthscope.app.paper.contents import draw_all
from depthscope.app.readings.readings import read_runs


@pytest.fixture(scope="module")
def readings(make_run):
    (reading,) = read_runs({"x": make_run("residual", layers=2)})
    return [replace(reading, name=f"run{number:02}") for number in range(12)]


def colours_of(readings):
    drawn = next(figure for _, figure in draw_all(readings, Selection()) if figure.name == "residual_norm")
    axes = to_matplotlib(drawn).axes[0]
    names = {reading.name for reading in readings}
    return {
        line.get_label(): to_hex(line.get_color()).upper() for line in axes.lines if line.get_label() in names
    }


def test_a_run_has_the_colour_of_its_name_whatever_is_shown_with_it(readings):
    demo = [replace(readings[0], name=name) for name in ("residual", "hc", "mhc")]
    together = colours_of(demo)
    for other in demo:
        shown = [reading for reading in reversed(demo) if reading is not other]
        assert colours_of(shown) == {name: together[name] for name in (each.name for each in shown)}
    assert together == {"residual": RUN_COLOURS[3], "hc": RUN_COLOURS[4], "mhc": RUN_COLOURS[1]}
    figure = compose("collapse", demo[1:])
    assert figure.runs == {name: RUN_COLOURS.index(together[name]) for name in ("hc", "mhc")}


def test_runs_whose_names_clash_take_the_next_free_colour_and_move_no_other():
    names = [f"run{number:02}" for number in range(25)]
    alone = {name: colour_numbers({name: xr.Dataset()})[name] for name in names}
    assert len(set(alone.values())) > 5
    numbers = colour_numbers(dict.fromkeys(names[:10], xr.Dataset()))
    assert sorted(numbers.values()) == list(range(10))
    for number in set(alone[name] for name in names[:10]):
        # The first by the alphabet of those that want a colour has it.
        assert numbers[next(name for name in names if alone[name] == number)] == number
    assert colour_numbers(dict.fromkeys(reversed(names[:10]), xr.Dataset())) == numbers
    assert sorted(colour_numbers(dict.fromkeys(names, xr.Dataset())).values())[:20] == list(range(20))


def test_screen_and_paper_draw_a_run_in_the_same_colour_and_shape(readings):
    chosen = {reading.name: reading.analysis for reading in readings[:11]}
    figure = FIGURES["residual_norm"].build(chosen)
    on_screen = {
        trace.name: (trace.line.color, trace.marker.symbol)
        for trace in to_plotly(figure).data
        if trace.name in chosen and "markers" in trace.mode
    }
    shapes = {code: shape for shape, code in curves.MARKERS.items()}
    on_paper = {
        line.get_label(): (to_hex(line.get_color()).upper(), shapes[line.get_marker()])
        for line in to_matplotlib(figure).axes[0].lines
        if line.get_label() in chosen
    }
    assert on_screen == on_paper
    edges = {
        trace.marker.line.color
        for trace in to_plotly(figure).data
        if trace.name in chosen and trace.marker.size
    }
    assert edges == {MARK_EDGE}
    assert len(on_paper) == len(set(on_paper.values())) == 11
