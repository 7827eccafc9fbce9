"""Does a run keep its colour, and do runs differ in colour, without one kind of cones, and in grey?"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from depthscope.app.drawing.matplotlib import curves, to_matplotlib
from depthscope.app.drawing.plotly import to_plotly
from depthscope.app.figures import FIGURES, Line, Lines, Selection
from depthscope.app.figures.composed import compose
from depthscope.app.figures.palette import MARK_EDGE, RUN_COLOUR, RUN_COLOURS, SHAPES, colour_numbers, look_of
from depthscope.app.paper.contents import draw_all
from depthscope.app.readings.readings import read_runs
from depthscope.app.tables.differences import difference_figure
from depthscope.diagnostics.analysis.differences import Difference

# Linear RGB as it is seen without one kind of cones: Machado, Oliveira & Fernandes 2009, severity 1.
CONES = {
    "none lacks": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(colour: str, seen: str = "none lacks") -> np.ndarray:
    x, y, z = TO_XYZ @ np.clip(np.array(CONES[seen]) @ linear(colour), 0, 1) / [0.95047, 1, 1.08883]
    f = [np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def luminance(colour: str) -> float:
    return float(linear(colour) @ TO_XYZ[1])


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


def test_the_palette_is_that_of_a_paper():
    assert list(RUN_COLOURS) == [to_hex(colour).upper() for colour in mpl.color_sequences["petroff10"]]


@pytest.mark.parametrize("seen", CONES)
def test_colours_are_told_apart_whatever_cones_an_eye_has(seen):
    distances = {
        pair: np.linalg.norm(lab(pair[0], seen) - lab(pair[1], seen)) for pair in combinations(RUN_COLOURS, 2)
    }
    assert min(distances.values()) > 17
    demo = colour_numbers(dict.fromkeys(("residual", "hc", "mhc"), xr.Dataset())).values()
    assert (
        min(
            np.linalg.norm(lab(RUN_COLOURS[one], seen) - lab(RUN_COLOURS[other], seen))
            for one, other in combinations(demo, 2)
        )
        > 40
    )


def test_the_first_runs_and_neighbours_differ_in_grey():
    grey = [lab(colour)[0] for colour in RUN_COLOURS]
    assert min(abs(one - other) for one, other in combinations(grey[:3], 2)) > 17
    assert min(abs(one - other) for one, other in pairwise(grey)) > 6


def test_looks_repeat_after_a_hundred_runs_and_shapes_after_ten():
    looks = [look_of(number) for number in range(10 * len(RUN_COLOURS))]
    assert len({(look.colour, look.shape) for look in looks}) == len(looks)
    assert [look.shape for look in looks[: len(SHAPES)]] == list(SHAPES)


@pytest.mark.parametrize("page", ["#FFFFFF", "#12161C"])
def test_marks_are_seen_on_white_and_on_the_dark_page(page):
    light, dark = sorted((luminance(MARK_EDGE) + 0.05, luminance(page) + 0.05), reverse=True)
    assert light / dark >= 3


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
    chosen = {"a": xr.Dataset(attrs={RUN_COLOUR: 3}), "b": xr.Dataset(attrs={RUN_COLOUR: 3})}
    assert colour_numbers(chosen) == {"a": 3, "b": 3}


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


def test_many_lines_have_marks_on_the_screen_and_the_legend_has_them_too():
    x = np.arange(100.0)
    lines = [
        Line(x, x + number, f"run{number} · {variant}", group=f"run{number}")
        for number in range(6)
        for variant in ("forward", "backward")
    ]
    traces = to_plotly(Lines("many", "M", "x", "y", tuple(lines))).data
    drawn = [trace for trace in traces if trace.x[0] is not None]
    assert all("markers" in trace.mode and trace.marker.maxdisplayed == 12 for trace in drawn)
    assert len({(trace.line.color, trace.line.dash) for trace in drawn}) == len(lines)
    legend = {trace.name: trace.marker.symbol for trace in traces if trace.showlegend is not False}
    assert [legend[f"run{number}"] for number in range(2)] == ["circle", "square"]


def test_a_difference_has_the_colour_of_its_run():
    values = xr.DataArray(np.arange(3.0), dims="depth")
    pairs = [
        Difference("effective_rank", "hc", other, values, values, values, "paired")
        for other in ("mhc", "residual")
    ]
    figure = difference_figure(pairs, "Effective rank", {"hc": 0, "mhc": 1, "residual": 2})
    colours = {trace.name: trace.line.color for trace in to_plotly(figure).data if trace.name}
    assert (colours["mhc − hc"], colours["residual − hc"]) == RUN_COLOURS[1:3]
